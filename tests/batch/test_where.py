"""--where compares, and does nothing else."""

import pytest

from vit_convert.batch.where import Where
from vit_convert.core.errors import UsageError

ROW = {"ds": "i1k", "size": 384, "lr": 0.03, "empty": None, "aug": "medium1"}


@pytest.mark.parametrize(
    "text",
    [
        "ds=='i1k' and size==384",
        "size in (224, 384) and not ds in ['i21k']",
        "lr*100 > 2 and lr < 0.1 <= 1",
        "'medium' in aug or unknown == 1",
        "empty == None and ds != None",
        "not empty < 3 and not empty >= 3 and not 3 < empty",
        "'x' not in empty and not 'x' in empty",
        "-size < 0 and size % 3 == 0 and size / 2 + 1 - 1 == 192",
    ],
)
def test_holds(text):
    assert Where(text, [*ROW, "unknown"]).holds(ROW)
    assert not Where(f"not ({text})", [*ROW, "unknown"]).holds(ROW)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("__import__('os')", "is not understood"),
        ("ds.upper() == 'I1K'", "is not understood"),
        ("ds[0] == 'i'", "is not understood"),
        ("(lambda: 1)()", "is not understood"),
        ("[x for x in (1, 2)]", "is not understood"),
        ("9**9**9", "is not understood"),
        ("ds = 'i1k'", "invalid syntax"),
        ("dss == 'i1k'", "no column 'dss'. Did you mean ds"),
        ("(" * 5000, "where"),
    ],
)
def test_refuses_at_once(text, said):
    with pytest.raises(UsageError, match=said):
        Where(text, ROW)


@pytest.mark.parametrize("text", ["ds * 1000000000 == ''", "ds < 3", "size / 0 == 1", "3 in size"])
def test_what_cannot_be_compared_is_said_with_its_row(text):
    with pytest.raises(UsageError, match="in row"):
        Where(text, ROW).holds(ROW)
