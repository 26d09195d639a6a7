"""DFYP in timm's registry: after `import geo_yield.timm_models`, `timm.create_model("dfyp_modis")` builds it.

So does whatever builds models through timm, e.g. torchgeo's `RegressionTask(model="dfyp_modis", in_channels=9,
num_outputs=1)`. timm's models take images and nothing else: every row takes the default operator. For routing by year
use `geo_yield.lightning.DFYPTask`.

`dfyp_modis` takes (B, bands, composites, bins); `dfyp_sentinel2` takes normalised single chips (B, 3, 224, 224).
"""

from collections.abc import Mapping

from jaxtyping import Float
from timm.models import register_model
from torch import Tensor, nn

from geo_yield.dfyp import DFYP, DFYPConfig
from geo_yield.dfyp_sentinel2 import DFYPSentinel2, DFYPSentinel2Config
from geo_yield.errors import InputProblem

__all__ = ["TimmDFYP", "TimmDFYPSentinel2", "dfyp_modis", "dfyp_sentinel2"]


class TimmDFYP(DFYP):
    """DFYP with timm's call: image in, (B, num_classes) out."""

    def __init__(self, config: DFYPConfig) -> None:
        super().__init__(config)
        self.num_classes = config.outputs

    def forward(self, image: Float[Tensor, "B C T K"]) -> Float[Tensor, "B num_classes"]:  # type: ignore[override]
        return self.scores(image)

    def get_classifier(self) -> nn.Module:
        """Both branches' last layers."""
        return nn.ModuleList([self.cnn.head, self.vit.head])


class TimmDFYPSentinel2(DFYPSentinel2):
    """DFYP for chips with timm's call: normalised chips in, (B, num_classes) out."""

    def __init__(self, config: DFYPSentinel2Config) -> None:
        super().__init__(config)
        self.num_classes = config.outputs

    def forward(self, image: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B num_classes"]:  # type: ignore[override]
        return self.scores(image)

    def get_classifier(self) -> nn.Module:
        """Both branches' last layers."""
        return nn.ModuleList([self.cnn.head, self.vit.head])


@register_model
def dfyp_modis(
    pretrained: bool = False,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: object = None,
    in_chans: int = 9,
    num_classes: int = 1,
    **config: object,
) -> TimmDFYP:
    """DFYP for histograms. Further keywords are fields of `DFYPConfig`; others raise TypeError."""
    _refuse_pretrained("dfyp_modis", pretrained, pretrained_cfg, pretrained_cfg_overlay, cache_dir)
    _refuse_unknown("dfyp_modis", config, DFYPConfig.__dataclass_fields__)
    return TimmDFYP(DFYPConfig(bands=in_chans, outputs=num_classes, **config))  # type: ignore[arg-type]


@register_model
def dfyp_sentinel2(
    pretrained: bool = False,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: object = None,
    in_chans: int = 3,
    num_classes: int = 2,
    **config: object,
) -> TimmDFYPSentinel2:
    """DFYP for Sentinel-2 chips. Further keywords are fields of `DFYPSentinel2Config`; others raise TypeError."""
    _refuse_pretrained("dfyp_sentinel2", pretrained, pretrained_cfg, pretrained_cfg_overlay, cache_dir)
    _refuse_unknown("dfyp_sentinel2", config, DFYPSentinel2Config.__dataclass_fields__)
    if in_chans != 3:
        raise InputProblem(f"dfyp_sentinel2 takes the luminance of 3 channels (B11, B08, B02), got in_chans={in_chans}")
    return TimmDFYPSentinel2(DFYPSentinel2Config(outputs=num_classes, **config))  # type: ignore[arg-type]


def _refuse_pretrained(name: str, pretrained: bool, *sources: object) -> None:
    if pretrained or any(source is not None for source in sources):
        raise InputProblem(f"{name} has no pretrained weights: create it with pretrained=False and train it")


def _refuse_unknown(name: str, config: Mapping[str, object], known: Mapping[str, object]) -> None:
    if unknown := sorted(set(config) - set(known)):
        raise TypeError(f"{name} has no option '{unknown[0]}'; it has {', '.join(known)}")
