"""Models of Hugging Face transformers in inference, by ``fastnn.convert(fuse=True)`` and :func:`fastnn.prepack_`: made of a
configuration, with random weights, torch's attention asked for as it is unless told otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from .benchmark import Benchmark, register
from .transformers import Hidden, images, inference, multiplications, patches, random_tokens

#: Frequencies of a spectrogram; patches of 16 × 16 are cut out every 10.
_MELS = 128


def _bert(length: int) -> torch.nn.Module:
    import transformers  # of the extra fastnn[bench]; importing it takes seconds

    config = transformers.BertConfig(max_position_embeddings=length)
    return Hidden(transformers.BertModel(config, add_pooling_layer=False))


def _vit(edge: int) -> torch.nn.Module:
    import transformers

    return Hidden(transformers.ViTModel(transformers.ViTConfig(image_size=edge), add_pooling_layer=False))


def _ast(frames: int) -> torch.nn.Module:
    import transformers

    config = transformers.ASTConfig(max_length=frames, num_mel_bins=_MELS)
    return Hidden(transformers.ASTModel(config))


def _spectrograms(n: int, frames: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, frames, _MELS).to(dtype)


def _cuttings(frames: int) -> int:
    return ((frames - 16) // 10 + 1) * ((_MELS - 16) // 10 + 1)


_FLOATS = (torch.float32, torch.bfloat16)
register(
    Benchmark(
        "hf_bert_base_inference",
        "NxL",
        ((1, 128), (8, 128)),
        inference(_bert, random_tokens, lambda shape: multiplications(shape[0] * shape[1], shape[1]), fuse=True),
        _FLOATS,
    )
)
register(
    Benchmark(
        "hf_vit_b_16_inference",
        "NxEDGE",
        ((1, 224), (8, 224)),
        inference(
            _vit,
            images,
            lambda shape: (
                multiplications(shape[0] * patches(shape[1]), patches(shape[1])) + shape[0] * 3 * 768 * shape[1] ** 2
            ),
            fuse=True,
        ),
        _FLOATS,
    )
)
register(
    Benchmark(
        "hf_audio_spectrogram_inference",
        "NxFRAMES",
        ((1, 1024),),
        inference(
            _ast,
            _spectrograms,
            lambda shape: (
                multiplications(shape[0] * (_cuttings(shape[1]) + 2), _cuttings(shape[1]) + 2)
                + shape[0] * _cuttings(shape[1]) * 256 * 768
            ),
            fuse=True,
        ),
        _FLOATS,
    )
)
