"""The public file of each published variant: where it lies, how large it is, and what head and resolution it has.

Sizes are those of the buckets' listings, as gsutil rounds them (google-research/vision_transformer, vit_jax.ipynb).
If no
listing shows one, none is given here, and a download is only compared with the length that the server reports.
"""

import dataclasses

from vit_convert.core.errors import CheckpointError

_UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}
_ROUNDING = 0.005  # of the unit: listings show two decimals
_HEADERS = 64 << 10  # saving the same arrays again changes the headers of some 200 members


@dataclasses.dataclass(frozen=True)
class Published:
    """One public checkpoint.

    Attributes:
        address: `gs://bucket/path`; public, without an account.
        image_size: side in pixels of the images of its last training.
        num_classes: outputs of its head.
        size: as listed, such as "336.89 MiB"; "" where no listing shows it.
        stores_positions: whether it holds a position table, from which `image_size` can be inferred.
        zero_head: whether its head was never trained and is all zeros.
    """

    address: str
    image_size: int
    num_classes: int = 1000
    size: str = ""
    stores_positions: bool = True
    zero_head: bool = False

    @property
    def name(self) -> str:
        """The file's name."""
        return self.address.rsplit("/", 1)[1]

    def may_have(self, num_bytes: int) -> bool:
        """Whether a file of this many bytes can be this one."""
        if not self.size:
            return True
        number, unit = self.size.split()
        return abs(num_bytes - float(number) * _UNITS[unit]) <= _ROUNDING * _UNITS[unit] + _HEADERS


_FINE_TUNED = "gs://vit_models/imagenet21k+imagenet2012"
_AUGREG = "gs://vit_models/augreg"
# No listing shows these; they are the names that the loader expects (issues 195 and 223 cite B_16).
_GSAM = "gs://vit_models/gsam"
_MIXER = "gs://mixer_models"
# timm's own addresses; no listing shows sizes
_TIMM, _RESOLVED = "https://huggingface.co/timm", "resolve/main/model.safetensors"

PUBLISHED = {
    "Ti/16": Published(
        f"{_AUGREG}/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--"
        "imagenet2012-steps_20k-lr_0.03-res_384.npz",
        384,
    ),
    "S/16": Published(
        f"{_AUGREG}/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--"
        "imagenet2012-steps_20k-lr_0.03-res_384.npz",
        384,
    ),
    "S/32": Published(
        f"{_AUGREG}/S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384.npz",
        384,
    ),
    "B/8": Published(f"{_FINE_TUNED}/ViT-B_8.npz", 384, size="334.78 MiB"),
    "B/16": Published(f"{_FINE_TUNED}/ViT-B_16.npz", 384, size="331.4 MiB"),
    "B/32": Published(f"{_FINE_TUNED}/ViT-B_32.npz", 384, size="336.89 MiB"),
    "L/16": Published(f"{_FINE_TUNED}/ViT-L_16.npz", 384, size="1.14 GiB"),
    "L/32": Published(f"{_FINE_TUNED}/ViT-L_32.npz", 384, size="1.14 GiB"),
    "H/14": Published(
        "gs://vit_models/imagenet21k/ViT-H_14.npz", 224, num_classes=21843, size="2.46 GiB", zero_head=True
    ),
    "S/16-gap-norep": Published(f"{_GSAM}/ViT-S_16.npz", 224),
    "S/32-gap-norep": Published(f"{_GSAM}/ViT-S_32.npz", 224),
    "B/16-gap-norep": Published(f"{_GSAM}/ViT-B_16.npz", 224),
    "B/32-gap-norep": Published(f"{_GSAM}/ViT-B_32.npz", 224),
    "R+ViT-Ti/16": Published(
        f"{_AUGREG}/R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--"
        "imagenet2012-steps_20k-lr_0.03-res_384.npz",
        384,
    ),
    "R26+ViT-S/32": Published(
        f"{_AUGREG}/R26_S_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0--"
        "imagenet2012-steps_20k-lr_0.03-res_384.npz",
        384,
    ),
    "R26+ViT-B/32": Published(
        "gs://vit_models/imagenet21k/R26+ViT-B_32.npz", 224, num_classes=21843, size="450.23 MiB", zero_head=True
    ),
    "R50+ViT-B/16": Published(f"{_FINE_TUNED}/R50+ViT-B_16.npz", 384, size="377.57 MiB"),
    "R50+ViT-L/32": Published(
        f"{_AUGREG}/R50_L_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0--"
        "imagenet2012-steps_20k-lr_0.01-res_384.npz",
        384,
    ),
    "Mixer-B/16": Published(f"{_MIXER}/imagenet1k/Mixer-B_16.npz", 224, size="228.47 MiB"),
    "Mixer-L/16": Published(f"{_MIXER}/imagenet1k/Mixer-L_16.npz", 224, size="794.29 MiB"),
    "Mixer-B/32": Published(f"{_MIXER}/gsam/Mixer-B_32.npz", 224, size="230.04 MiB"),
    "Mixer-S/8": Published(f"{_MIXER}/gsam/Mixer-S_8.npz", 224, size="78.79 MiB"),
    "Mixer-S/16": Published(f"{_MIXER}/gsam/Mixer-S_16.npz", 224, size="70.71 MiB"),
    "Mixer-S/32": Published(f"{_MIXER}/gsam/Mixer-S_32.npz", 224, size="72.91 MiB"),
    "Swin-T/7": Published(f"{_TIMM}/swin_tiny_patch4_window7_224.ms_in1k/{_RESOLVED}", 224),
    "Swin-S/7": Published(f"{_TIMM}/swin_small_patch4_window7_224.ms_in1k/{_RESOLVED}", 224),
    "Swin-B/7": Published(f"{_TIMM}/swin_base_patch4_window7_224.ms_in22k_ft_in1k/{_RESOLVED}", 224),
    "Swin-B/12": Published(f"{_TIMM}/swin_base_patch4_window12_384.ms_in22k_ft_in1k/{_RESOLVED}", 384),
    "Swin-L/7": Published(f"{_TIMM}/swin_large_patch4_window7_224.ms_in22k_ft_in1k/{_RESOLVED}", 224),
    "Swin-L/12": Published(f"{_TIMM}/swin_large_patch4_window12_384.ms_in22k_ft_in1k/{_RESOLVED}", 384),
    "bv_s16_i1k": Published("gs://big_vision/vit_s16_i1k_90ep.npz", 224, stores_positions=False),
}


def published_at(address: str) -> Published | None:
    """The public checkpoint at an address; None if the table has none."""
    return next((file for file in PUBLISHED.values() if file.address == address), None)


def require_published(file: Published, path: str, image_size: tuple[int, int], num_classes: int) -> None:
    """Refuses a file of the right name that is another model: several public folders use the same names.

    Args:
        file: what it should be.
        path: of the file, for the message.
        image_size: (height, width) in pixels that its position table is for.
        num_classes: outputs of its head; 0 if the file has none.

    Raises:
        CheckpointError: another head or resolution.
    """
    found, wanted = f"{image_size[0]}x{image_size[1]} pixels", f"{file.image_size}x{file.image_size} pixels"
    if num_classes and num_classes != file.num_classes:
        found, wanted = f"{num_classes} classes", f"{file.num_classes} classes"
    elif not file.stores_positions:
        return
    if found != wanted:
        raise CheckpointError(
            f"{path}: {found}, {file.address} has {wanted}",
            fix=f"It is another file of that name: move it away, or give --config.checkpoint={path} to convert it.",
        )
