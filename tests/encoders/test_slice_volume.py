"""Slices in chunks, stacks of any length, and the parts that are exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medssl.build import load_encoder
from medssl.encoders import slice_volume
from medssl.encoders.image2d import Image2D, running_statistics_kept
from medssl.encoders.slice_volume import SliceVolumeEncoder, as_stacks, pad_stacks
from medssl.errors import RequestError
from medssl.layers.deformable import SliceAggregator
from medssl.layers.planes import slices_of
from medssl.weights import load_part, save_part
from tests.encoders.families import FAMILIES

AGGREGATOR = {"depth": 1, "heads": 2, "dim_head": 8, "hidden_dim": 16, "dropout": 0.0}
GROUP_NORM = {"model": "resnet18", "model_args": {"norm_layer": "groupnorm"}}


def build(slice_encoder: dict[str, Any] | None = None, **args: Any) -> SliceVolumeEncoder:
    torch.manual_seed(0)
    return SliceVolumeEncoder(slice_encoder=slice_encoder or {"model": "resnet18"}, aggregator=AGGREGATOR, **{"dim": 16, **args})


def gradients(encoder: SliceVolumeEncoder, stacks: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
    encoder.zero_grad()
    torch.manual_seed(0)
    encoder.embed_slices(stacks, valid).square().sum().backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_family__embeds_stacks_of_unequal_length(family: str) -> None:
    args, size = FAMILIES[family]
    encoder = build(args, in_channels=2, chunk=2)
    stacks, valid = pad_stacks([torch.randn(n, 2, *size) for n in (1, 2)])
    output = encoder.forward_features(stacks, valid=valid, z_mm=torch.tensor([[0.0, 0.0], [0.0, 3.0]]), kind="clip")
    assert output.tokens.shape == (2, 2, 16) and (output.tokens[0, 1] == 0).all()
    output.pooled.square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_stacks__of_different_length_in_a_batch_equal_each_alone() -> None:
    encoder = build(chunk=3).eval()
    alone = [torch.randn(n, 1, 32, 32) for n in (1, 7, 4)]
    steps = [1.0, 5.0, 2.5]
    stacks, valid = pad_stacks(alone)
    z_mm = torch.arange(7.0) * torch.tensor(steps)[:, None]
    with torch.no_grad():
        together = encoder.forward_features(stacks, valid=valid, z_mm=z_mm, kind="clip")
        for b, stack in enumerate(alone):
            one = encoder.forward_features(stack[None], z_mm=z_mm[b : b + 1, : len(stack)], kind="clip")
            assert torch.allclose(together.pooled[b], one.pooled[0], atol=1e-5)


def test_axes__volume_clip_and_image_are_stacks() -> None:
    volume = torch.randn(2, 3, 4, 5, 6)
    for axis, length in enumerate((4, 5, 6)):
        stacks = as_stacks(volume, "volume", axis)
        assert stacks.shape[:3] == (2, length, 3)
        assert torch.equal(stacks[1, 2, 0], volume[1, 0].select(axis, 2).T.flip(0, 1))
    assert torch.equal(as_stacks(volume, "volume", None), as_stacks(volume, "volume", 2))
    assert as_stacks(volume, "clip") is volume
    assert as_stacks(volume[:, :, 0]).shape == (2, 1, 3, 5, 6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_volume__is_cut_into_the_slices_of_pretraining(axis: int) -> None:
    """Sources turn slices as a radiologist looks at them; an encoder that cuts a volume otherwise sees other images than it was trained on."""
    from medssl.sampling.planes import display

    volume = torch.randn(1, 2, 4, 5, 6)
    planes = display(np.moveaxis(volume[0].numpy(), 1 + axis, 0), axis)  # as `read_planes`: (N, C, A, B), turned
    assert np.array_equal(as_stacks(volume, "volume", axis)[0].numpy(), planes)
    valid = volume[:, 0] > 0
    assert torch.equal(slices_of(valid, axis, channels=False), as_stacks(volume, "volume", axis)[:, :, 0] > 0)


def test_inflated_kernels__want_what_nibabel_calls_pls() -> None:
    """The axes that an inflated export asks for are rows, columns and order of the slices as they are shown."""
    from nibabel.orientations import apply_orientation, axcodes2ornt, ornt_transform

    volume = np.random.default_rng(0).normal(size=(4, 5, 6))
    turned = apply_orientation(volume, ornt_transform(axcodes2ornt("RAS"), axcodes2ornt("PLS")))  # type: ignore[no-untyped-call]
    stack = as_stacks(torch.from_numpy(volume)[None, None])[0, :, 0].numpy()
    assert np.array_equal(np.moveaxis(turned, 2, 0), stack)


def test_image__is_a_volume_of_one_slice() -> None:
    encoder = build(in_channels=2).eval()
    image = torch.randn(2, 2, 32, 64)
    with torch.no_grad():
        single = encoder(image)
        turned = image.flip(-2, -1).transpose(-1, -2)[..., None]  # (B, C, X, Y, 1)
        volume = encoder.forward_features(turned, z_mm=torch.tensor([[-310.0], [12.0]]))
    assert torch.equal(single.pooled, volume.pooled) and single.grid == (1,)


def test_chunk__does_not_change_what_is_evaluated() -> None:
    encoder = build(pool="stages").eval()
    stacks = torch.randn(2, 7, 1, 32, 32)
    with torch.no_grad():
        encoder.chunk = 100
        whole = encoder.embed_slices(stacks)
        for chunk in (1, 3, 5):
            encoder.chunk = chunk
            assert torch.allclose(encoder.embed_slices(stacks), whole, atol=1e-6)


def test_chunk__with_group_norm_changes_no_gradient() -> None:
    encoder = build(GROUP_NORM).double()
    stacks = torch.randn(1, 6, 1, 32, 32, dtype=torch.float64)
    encoder.chunk = 100
    whole = gradients(encoder, stacks)
    encoder.chunk = 2
    chunked = gradients(encoder, stacks)
    assert whole.keys() == chunked.keys()
    assert all(torch.allclose(whole[key], chunked[key], rtol=1e-9, atol=1e-12) for key in whole)


@pytest.mark.parametrize("inner", [False, True])
def test_chunk__recomputing_changes_neither_gradients_nor_running_statistics(inner: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stacks = torch.randn(2, 5, 1, 64, 64)
    results = []
    for plain in (True, False):
        encoder = build({"model": "resnet18", "model_args": {"drop_path_rate": 0.5}}, chunk=4)  # drop path: the same noise again
        encoder.checkpoint_blocks = inner and not plain
        with monkeypatch.context() as patch:
            if plain:
                patch.setattr(slice_volume, "recomputed", lambda _, call, *args: call(*args))
            results.append((gradients(encoder, stacks), dict(encoder.named_buffers())))
    (expected, statistics), (found, same) = results
    assert all(torch.allclose(expected[key], found[key], rtol=1e-4, atol=1e-5) for key in expected)
    assert all(torch.equal(statistics[key], same[key]) for key in statistics)
    assert int(same["slice_encoder.net.bn1.num_batches_tracked"]) == 3  # ten slices in chunks of at most four


def test_chunk__batch_statistics_are_nearer_to_the_whole_batch_than_those_of_neighbouring_slices() -> None:
    encoder = build(pool="last")
    brightness = torch.linspace(0, 4, 32)[None, :, None, None, None]  # anatomy changes along a stack
    stacks = brightness + torch.randn(1, 32, 1, 64, 64)
    with torch.no_grad(), running_statistics_kept(encoder):
        encoder.chunk = 100
        whole = encoder.embed_slices(stacks)
        encoder.chunk = 8
        spread = encoder.embed_slices(stacks)
        contiguous = torch.cat([encoder.embed_slices(part) for part in stacks.split(8, dim=1)], dim=1)
    error = [float((found - whole).norm() / whole.norm()) for found in (spread, contiguous)]
    assert error[0] < 0.5 * error[1]


def saved_bytes(encoder: SliceVolumeEncoder, stacks: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, the input and the weights not counted."""
    known = {stacks.untyped_storage().data_ptr(), *(p.untyped_storage().data_ptr() for p in encoder.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = encoder.embed_slices(stacks)
    del output
    return sum(kept.values())


def test_chunk__keeps_next_to_nothing_between_forward_and_backward() -> None:
    encoder = build(chunk=2)
    stacks = torch.randn(1, 8, 1, 64, 64)
    chunked = saved_bytes(encoder, stacks)
    encoder.chunk = 8
    assert chunked < 0.01 * saved_bytes(encoder, stacks)


def test_padding__is_not_looked_at() -> None:
    encoder = build(chunk=2)
    stacks = torch.randn(1, 5, 1, 32, 32)
    valid = torch.tensor([[True, True, False, True, True]])
    stacks[0, 2] = float("nan")
    stacks.requires_grad_()
    z_mm = torch.arange(5.0)[None]
    output = encoder.forward_features(stacks, valid=valid, z_mm=z_mm, kind="clip")
    output.pooled[:, 0].sum().backward()  # not the whole sum, which the last norm holds at a constant
    assert stacks.grad is not None and (stacks.grad[0, 2] == 0).all() and (stacks.grad[0, [0, 1, 3, 4]] != 0).any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert all(buffer.isfinite().all() for buffer in encoder.buffers())


def test_padding__alone_gives_zeros_and_a_zero_gradient_for_every_parameter() -> None:
    encoder = build(pool="stages")
    before = {key: value.clone() for key, value in encoder.named_buffers()}
    stacks = torch.full((2, 3, 1, 32, 32), float("nan"))
    output = encoder.forward_features(stacks, valid=torch.zeros(2, 3, dtype=torch.bool), z_mm=torch.zeros(2, 3), kind="clip")
    assert (output.pooled == 0).all() and (output.tokens == 0).all()
    output.pooled.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in encoder.parameters())
    assert all(torch.equal(value, before[key]) for key, value in encoder.named_buffers())


@pytest.mark.parametrize("slice_encoder", [{"model": "resnet18"}, GROUP_NORM, {"model": "convnext_atto"}])
@pytest.mark.parametrize("pool", ["last", "stages"])
def test_constant_slices__give_finite_gradients(slice_encoder: dict[str, Any], pool: str) -> None:
    encoder = build(slice_encoder, pool=pool, chunk=2)
    stacks = torch.zeros(1, 3, 1, 32, 32)
    stacks[0, 1] = 5.0
    output = encoder.forward_features(stacks, z_mm=torch.arange(3.0)[None], kind="clip")
    output.pooled.square().sum().backward()
    assert output.pooled.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_reach__a_slice_embedding_depends_on_its_own_slice_alone() -> None:
    encoder = build(GROUP_NORM, chunk=2)
    stacks = torch.randn(1, 4, 1, 32, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(encoder.embed_slices(stacks)[0, 2].sum(), stacks)
    assert grad[0].flatten(1).abs().sum(dim=1).nonzero()[:, 0].tolist() == [2]


def test_parts__are_written_and_loaded(tmp_path: Path) -> None:
    encoder = build(in_channels=2, pool="stages").eval()
    paths = {}
    for name, part in encoder.parts().items():
        state = {key[len(part.prefix) :]: value for key, value in part.module.state_dict().items() if key.startswith(part.prefix)}
        paths[name] = save_part(tmp_path, name, state, part.manifest)
    x, z_mm = torch.randn(1, 2, 32, 32, 3), torch.tensor([[0.0, 2.0, 5.0]])
    with torch.no_grad():
        expected = encoder.forward_features(x, z_mm=z_mm)
        joint = load_encoder(paths["joint"])
        assert isinstance(joint, SliceVolumeEncoder)
        assert torch.equal(joint.forward_features(x, z_mm=z_mm).pooled, expected.pooled)
        alone = load_encoder(paths["slice_encoder"])
        assert isinstance(alone, Image2D)
        assert torch.equal(alone(x[..., 0]).pooled, encoder.slice_encoder(x[..., 0]).pooled)
    with pytest.raises(RequestError, match=r"the part aggregator, and slice_volume loads encoder, joint; give the path"):
        load_encoder(paths["aggregator"])
    state, manifest = load_part(paths["aggregator"])
    aggregator = SliceAggregator(manifest["encoder"]["args"]["dim"], **manifest["encoder"]["args"]["aggregator"]).eval()
    aggregator.load_state_dict(state, strict=True)
    with torch.no_grad():
        tokens = encoder.embed_slices(as_stacks(x))
        assert torch.equal(aggregator(tokens, None, z_mm).pooled, expected.pooled)


def test_slice_encoder__part_has_timms_keys() -> None:
    import timm

    encoder = build()
    part = encoder.part("slice_encoder")
    keys = [key.removeprefix(part.prefix) for key in part.module.state_dict()]
    assert keys == list(timm.create_model("resnet18", in_chans=1, num_classes=0).state_dict())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: build()(torch.zeros(1, 3, 32, 32)), r"takes slices of 1 channel\(s\)"),
        (lambda: build()(torch.zeros(1, 2, 32, 32, 4)), r"takes slices of 1 channel\(s\)"),
        (lambda: build()(torch.zeros(1, 1, 32, 32, 4)), "nothing assumes a step of 1 mm"),
        (lambda: build().forward_features(torch.zeros(1, 1, 4, 4, 4), slice_axis=3), "slice_axis is 3"),
        (lambda: build()(torch.zeros(1, 32, 32)), r"volume of shape \(1, 32, 32\)"),
        (
            lambda: pad_stacks([torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8)]),
            "mixed channel counts in one batch.* 1x8x8, 3x8x8",
        ),
        (lambda: pad_stacks([torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 9, 8)]), "mixed image sizes"),
    ],
)
def test_input__is_refused_with_a_sentence(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"slice_encoder": {"modle": "resnet18"}}, r'slice_volume.slice_encoder.modle: unknown key \(did you mean "model"'),
        ({"slice_encoder": {"in_channels": 3}}, "slice_encoder.in_channels: unknown key"),
        ({"aggregator": {"detph": 3}}, 'did you mean "depth"'),
        ({"pool": "mean"}, "accepted: last, stages"),
        ({"chunk": 0}, "accepted: 1 or more"),
    ],
)
def test_arguments__are_refused_with_a_sentence(args: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        SliceVolumeEncoder(**args)
