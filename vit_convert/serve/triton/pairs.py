"""The models of a pair of towers in a repository: both towers, the models around them, and their similarity."""

import dataclasses
import json
import os
from collections.abc import Mapping

from vit_convert.core.errors import UsageError
from vit_convert.core.pair import PairFacts
from vit_convert.core.signature import Tensor
from vit_convert.core.version import __version__
from vit_convert.engine.pair_bundle import open_pair
from vit_convert.serve.triton import pbtxt
from vit_convert.serve.triton.ensembles import takes_patches
from vit_convert.serve.triton.models.preprocess import ENCODED, PIXELS
from vit_convert.serve.triton.models.similarity import LOGITS, SIMILARITY
from vit_convert.serve.triton.models.tokenize import FOLDER, PROMPT
from vit_convert.serve.triton.models_of import models_of
from vit_convert.serve.triton.offered import Offered, read_offered
from vit_convert.serve.triton.parts import CALLS, Asked, head, known
from vit_convert.serve.triton.pbtxt import Chosen, parameter, quoted, step
from vit_convert.serve.triton.repository import HEADER, Content, ModelFolder, shim
from vit_convert.text.prompting import Prompting
from vit_convert.text.tokenizer import open_tokenizer, tokenizer_files

KEPT_TEXTS = 10_000
_PROMPT = Tensor(PROMPT, "bytes", ("batch", 1))


@dataclasses.dataclass(frozen=True)
class OfferedPair:
    """What is known about a pair.

    Attributes:
        facts: how embeddings are compared.
        image: the image tower.
        text: the text tower.
    """

    facts: PairFacts
    image: Offered
    text: Offered

    @property
    def tokens(self) -> Tensor:
        """The text tower's input."""
        return self.text.signature.inputs[0]


def read_pair_offered(path: str | os.PathLike[str], precision: str = "") -> OfferedPair:
    """Reads a pair.

    Args:
        path: written by the conversion, `<workdir>/<name>`.
        precision: see `read_offered`.

    Raises:
        UsageError: it is not finished, or its towers are from other conversions or have more than one input that is no
                part of an image.
        BuildError: see `read_offered`.
    """
    facts, bundles = open_pair(path)
    found = {tower: read_offered(bundle.root, precision) for tower, bundle in bundles.items()}
    for tower, offered in found.items():
        if len(offered.signature.inputs) > 1 and not takes_patches(offered):
            names = ", ".join(tensor.name for tensor in offered.signature.inputs)
            raise UsageError(
                f"{offered.bundle.root}: takes {names}; a pair is served with one input a tower",
                fix=f"Serve {tower} by itself: give {offered.bundle.root}.",
            )
    return OfferedPair(facts, found["image"], found["text"])


def models_of_pair(pair: OfferedPair, asked: Asked) -> list[ModelFolder]:
    """All models of a pair, with those that others need first.

    Args:
        pair: from `read_pair_offered`.
        asked: by the command line; with `tokenizer`, prompts are taken too.

    Raises:
        BuildError, UsageError: see `models_of`.
        CalibrationError: the tokenizer is not the text tower's.
    """
    if asked.labels:
        raise UsageError(
            f"--labels={asked.labels}: {asked.name} is a pair of towers, and gives no classes",
            fix="Send the classes' names as prompts.",
        )
    name = asked.name
    models = [
        *models_of(pair.image, dataclasses.replace(asked, network=f"{name}_image_tower", response_cache=False)),
        *models_of(pair.text, dataclasses.replace(asked, name=f"{name}_text")),
    ]
    if any(tensor.shape[0] != "batch" for tensor in (pair.tokens, *pair.image.signature.inputs)):
        return models  # a graph with a fixed batch takes no other number of texts or images
    if asked.tokenizer:
        models += [_tokenize(pair, asked), _prompt(pair, asked)]
    return [*models, _similarity(pair, asked)]


def _tokenize(pair: OfferedPair, asked: Asked) -> ModelFolder:
    """prompt → tokens."""
    rule = Prompting.from_dict(pair.facts.text)
    open_tokenizer(asked.tokenizer, rule)  # refuses another model's tokenizer here, and not only in the server
    files = tokenizer_files(asked.tokenizer, rule)
    name = f"{asked.name}_tokenize"
    why = "How the text tower's training made tokens of prompts, as pair.json has it."
    parts = [
        *head(pair.text, name, "python"),
        Chosen(f"max_batch_size: {pair.text.max_batch}", "config.batch.max of the conversion."),
        pbtxt.tensor("input", _PROMPT),
        pbtxt.tensor("output", pair.tokens),
        Chosen("instance_group [ { count: 1 kind: KIND_CPU } ]", "One process, since it only looks up words."),
        dataclasses.replace(parameter("prompting", json.dumps(rule.to_dict(), sort_keys=True)), why=why),
        parameter("file", files[0].name),
    ]
    content: Mapping[str, Content] = {"model.py": shim("tokenize"), **{f"{FOLDER}/{path.name}": path for path in files}}
    return ModelFolder(name, pbtxt.document(parts), asked.version, content)


def _prompt(pair: OfferedPair, asked: Asked) -> ModelFolder:
    """prompt → embedding."""
    name, tokens, results = f"{asked.name}_prompt", pair.tokens.name, pair.text.signature.outputs
    steps = [
        step(f"{asked.name}_tokenize", {PROMPT: PROMPT}, {tokens: tokens}),
        step(f"{asked.name}_text", {tokens: tokens}, {output.name: output.name for output in results}),
    ]
    parts = [
        Chosen(f"{HEADER} {__version__} from {pair.text.bundle.root.parent.name}."),
        Chosen(f'name: {quoted(name)}\nplatform: "ensemble"', "From prompts, by the checkpoint's own tokenizer."),
        Chosen(f"max_batch_size: {pair.text.max_batch}", "config.batch.max of the conversion."),
        pbtxt.tensor("input", _PROMPT),
        *(pbtxt.tensor("output", known(pair.text, output)) for output in results),
        Chosen("ensemble_scheduling {\n  step [\n" + ",\n".join(steps) + "\n  ]\n}"),
    ]
    return ModelFolder(name, pbtxt.document(parts), asked.version)


def _similarity(pair: OfferedPair, asked: Asked) -> ModelFolder:
    """Images and texts → similarity of each image to each text."""
    name = f"{asked.name}_similarity"
    length = pair.tokens.shape[1]
    taken = [Tensor(ENCODED, "bytes", ("images",)), Tensor(PIXELS, "uint8", ("images", "height", "width", 3))]
    taken += [Tensor("tokens", pair.tokens.dtype, ("texts", length))]
    taken += [Tensor(PROMPT, "bytes", ("texts",))] if asked.tokenizer else []
    given = [Tensor(result, "float32", ("images", "texts")) for result in (SIMILARITY, LOGITS)]
    facts = {key: value for key, value in pair.facts.to_dict().items() if key != "text"}
    processes = "One process, so that all requests share the embeddings that it keeps."
    kept = "Embeddings of texts to keep, those that were asked for last; each is a row of float32."
    compared = "How embeddings are compared, as pair.json has it."
    called = [ENCODED, PIXELS, "text", *(["tokenize"] if asked.tokenizer else [])]
    parts = [
        *head(pair.image, name, "python"),
        Chosen("max_batch_size: 0", "Each image is compared with each text: there is no common batch."),
        *(pbtxt.tensor("input", tensor, batched=False, more="optional: true") for tensor in taken),
        *(pbtxt.tensor("output", tensor, batched=False) for tensor in given),
        Chosen("instance_group [ { count: 1 kind: KIND_CPU } ]", processes),
        dataclasses.replace(parameter("kept_texts", KEPT_TEXTS), why=kept),
        dataclasses.replace(parameter("pair", json.dumps({**facts, "text": {}}, sort_keys=True)), why=compared),
        parameter("name", asked.name),
        parameter(CALLS, " ".join(f"{asked.name}_{part}" for part in called)),
        parameter("vocabulary", pair.tokens.below),
        parameter("most", min(pair.image.max_batch, pair.text.max_batch)),
    ]
    return ModelFolder(name, pbtxt.document(parts), asked.version, {"model.py": shim("similarity")})
