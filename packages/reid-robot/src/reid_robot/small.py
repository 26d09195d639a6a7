"""The small network that comes with the package: trained on generated people only, 1.4 MB, crops of 64 x 32.

ResNet-18 of width 16 with light attention (Eisenbach et al., arXiv:2302.14574) after stages 2 to 4; made by
proofs/train_small.py, whose scores are beside it in small.json. It has never seen a real person. Apache-2.0 as the
package.
"""

from pathlib import Path

from reid_robot.network import ReidNet

SMALL = Path(__file__).with_name("small.safetensors")


def load_small() -> ReidNet:
    """The network, in float32 and eval mode."""
    return ReidNet.load(SMALL)
