"""Networks for ONNX Runtime, in float and in 8 bits, and proof that they are the same network.

Normalisation of the crops is part of the graph unless asked otherwise (`input_type`), since features that differ after
export because pictures were normalised twice, or never, are the commonest trouble with exported networks. Batch norms
are folded before. Eight bits: static quantisation (QDQ, weights per channel) with ranges from crops that the caller
gives.

Needs the extra `onnx`. The network is of Eisenbach et al. (arXiv:2302.14574); see network.py.
"""

import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from reid_robot.folding import fold_batch_norms
from reid_robot.network import ReidNet

InputType = Literal["uint8", "float32"]
_OPSET = 18


def export_onnx(net: ReidNet, path: Path, *, input_type: InputType = "uint8", opset: int = _OPSET) -> None:
    """Writes the network: crops (B, 3, H, W), any B, in, embeddings (B, D) of unit norm out.

    input_type "uint8": RGB pixels, normalised in the graph; "float32": normalised by the caller. Raises ValueError on
    another type.
    """
    if input_type not in ("uint8", "float32"):
        raise ValueError(f"input_type must be 'uint8' or 'float32', got {input_type!r}")
    example = torch.randint(0, 256, (2, 3, *net.config.input_size), dtype=torch.uint8, device=net.mean.device)
    crops: Tensor = example if input_type == "uint8" else (example / 255 - net.mean) / net.std
    folded = fold_batch_norms(net, crops)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        torch.onnx.export(
            folded,
            (crops,),
            str(temporary),
            input_names=["crops"],
            output_names=["embeddings"],
            dynamic_shapes={"crops": {0: torch.export.Dim("batch", min=1, max=4096)}},
            opset_version=opset,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    temporary.replace(path)


def quantize_onnx(path: Path, out: Path, crops: Iterable[np.ndarray]) -> None:
    """Eight-bit weights and activations. crops: batches as the network at `path` takes them, a hundred crops or
    more.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = iter(crops)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(batches, None)
            return None if batch is None else {"crops": batch}

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        prepared, made = Path(folder) / "prepared.onnx", Path(folder) / "made.onnx"
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)  # it fails on the batch axis
        quantization.quantize_static(
            str(prepared),
            str(made),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        )
        part = out.with_name(out.name + ".part")
        part.write_bytes(made.read_bytes())
        part.replace(out)


class OnnxEmbedder:
    """A network in ONNX Runtime. Called with pictures of people of any size, it scales and embeds them.

    threads: of ONNX Runtime, within an operation. Raises FileNotFoundError, and ValueError for another network.
    """

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        import onnxruntime

        if not path.exists():
            raise FileNotFoundError(f"no network at '{path}'")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session: Any = onnxruntime.InferenceSession(
            str(path), sess_options=options, providers=["CPUExecutionProvider"]
        )
        given = self.session.get_inputs()[0]
        if given.name != "crops" or len(given.shape) != 4:
            raise ValueError(f"'{path}' was not written by export_onnx: its input is {given.name} {given.shape}")
        self.size = (int(given.shape[2]), int(given.shape[3]))
        self.uint8 = given.type == "tensor(uint8)"

    def run(self, crops: np.ndarray) -> Float[np.ndarray, "B D"]:
        """Embeddings of crops (B, 3, H, W) that fit the network's input."""
        return self.session.run(None, {"crops": crops})[0]

    def __call__(self, pictures: Sequence[UInt8[np.ndarray, "h w 3"]]) -> Float[np.ndarray, "B D"]:
        """Embeddings of RGB pictures. ValueError for an empty picture, or a network that wants normalised floats."""
        if not self.uint8:
            raise ValueError("this network takes normalised floats: export it with input_type='uint8', or use run()")
        return self.run(scale_pictures(pictures, self.size))


class TorchEmbedder:
    """The same in PyTorch, for networks that are not exported."""

    def __init__(self, net: ReidNet) -> None:
        self.net = net.eval()
        self.size = net.config.input_size

    def __call__(self, pictures: Sequence[UInt8[np.ndarray, "h w 3"]]) -> Float[np.ndarray, "B D"]:
        """Embeddings of RGB pictures. ValueError for an empty picture."""
        with torch.inference_mode():
            return (
                self.net(torch.from_numpy(scale_pictures(pictures, self.size)).to(self.net.mean.device)).cpu().numpy()
            )


def scale_pictures(
    pictures: Sequence[UInt8[np.ndarray, "h w 3"]], size: tuple[int, int]
) -> UInt8[np.ndarray, "B 3 H W"]:
    """Pictures of any sizes as one batch, bilinear, averaging where they shrink by more than half."""
    batch = np.empty((len(pictures), 3, *size), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        if picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape or picture.dtype != np.uint8:
            raise ValueError(f"picture {i} must be (h, w, 3) uint8 and not empty, got {picture.shape} {picture.dtype}")
        shrinks = picture.shape[0] > 2 * size[0]
        scaled = cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        batch[i] = scaled.transpose(2, 0, 1)
    return batch


def worst_cosine(net: nn.Module, embedder: OnnxEmbedder, crops: UInt8[Tensor, "B 3 H W"]) -> float:
    """The smallest cosine, over crops, between the network's embedding and that of its exported form."""
    with torch.inference_mode():
        ours = net.eval()(crops).cpu().numpy()
    theirs = embedder.run(crops.numpy())
    return float((ours * theirs).sum(1).min())
