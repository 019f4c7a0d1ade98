"""What stages have returned so far: each by its name, in the order in which they did."""

import pytest

from vit_convert.core.results import NotRunError, Results
from vit_convert.core.stage_results import ExportResult, ImagesResult
from vit_convert.stages import stages
from vit_convert.stages.pair import PAIR, SIMILARITY

IMAGES, EXPORT = ImagesResult(num_images=4, summary="4 images"), ExportResult.from_dict({"taps": ["block_00"]})


def test_each_by_its_name():
    found = Results(images=IMAGES)
    assert found.images is IMAGES is found.get("images")
    found.put("export", EXPORT)
    assert found.export.taps == ("block_00",) and [*found] == ["images", "export"]


NAMES = [name for name, value in vars(Results).items() if hasattr(value, "kind")]


@pytest.mark.parametrize("name", NAMES)
def test_what_did_not_run_is_named(name):
    with pytest.raises(NotRunError, match=rf"^'stage {name} did not run'$"):
        getattr(Results(), name)
    assert Results().get(name) is None


def test_every_stage_has_its_own_record():
    found = {stage.name: stage.result for stage in [*stages(), PAIR, SIMILARITY]}
    assert found == {name: getattr(Results, name).kind for name in NAMES}


def test_a_copy_is_apart():
    first = Results(images=IMAGES)
    second = first.copy()
    second.put("export", EXPORT)
    assert [*first] == ["images"] and [*second] == ["images", "export"]
