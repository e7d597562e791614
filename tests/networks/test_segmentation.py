from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from medssl.encoders.resenc3d import ResEnc3D
from medssl.encoders.segresnet3d import SegResNet3D
from medssl.encoders.swin3d import Swin3D
from medssl.encoders.vit3d import ViT3D
from medssl.errors import RequestError, WeightsError
from medssl.networks.segmentation import (
    POSITIONS,
    build_resenc_unet,
    build_segresnet,
    build_swin_unetr,
    build_unetr,
    encoder_parameters,
    load_pretrained,
    set_head_prior,
)

SEG = {"in_channels": 1, "init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]}
RESENC = {"features_per_stage": [8, 12, 16], "n_blocks_per_stage": [1, 2, 1], "strides": [1, 2, [2, 2, 1]]}
SWIN = {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2], "window_size": [4, 3, 2]}
VIT = {"in_channels": 1, "image_size": [48, 32, 16], "patch_size": [16, 16, 16], "hidden_size": 24, "num_heads": 2}


def seeded(build: Any, seed: int, **kw: Any) -> Any:
    torch.manual_seed(seed)
    return build(**kw)


def segresnet_part(seed: int = 1, **changes: Any) -> tuple[SegResNet3D, dict[str, Tensor], dict[str, Any]]:
    encoder = seeded(SegResNet3D, seed, **{**SEG, **changes})
    state = {k: v for k, v in encoder.net.state_dict().items() if k.startswith(("convInit.", "down_layers."))}
    manifest = {"library": encoder.library, "key_groups": encoder.key_groups, "encoder": encoder.config()}
    return encoder, state, manifest


def vit_part(seed: int = 1, **changes: Any) -> tuple[ViT3D, dict[str, Tensor], dict[str, Any]]:
    encoder = seeded(ViT3D, seed, **{**VIT, **changes})
    with torch.no_grad():
        torch.nn.init.normal_(encoder.net.patch_embedding.position_embeddings)
    manifest = {
        "library": encoder.library,
        "key_groups": encoder.key_groups,
        "encoder": encoder.config(),
        "image_size": encoder.config()["args"]["image_size"],
        "patch_size": list(encoder.patch_size),
    }
    return encoder, dict(encoder.net.state_dict()), manifest


def test_segresnet_encoder__gives_equal_features_and_other_outputs() -> None:
    encoder, state, manifest = segresnet_part()
    network: Any = seeded(build_segresnet, 2, encoder=encoder.config(), out_channels=3, image_size=(8, 12, 16)).eval()
    x = torch.randn(1, 1, 8, 12, 16)
    with torch.no_grad():
        before = network(x)
        report = load_pretrained(network, state, manifest)
        after = network(x)
        pyramid = encoder.forward_features(x).pyramid
        _, skips = network.encode(x)
    assert (before - after).abs().max() > 1e-3
    for own, ours in zip(skips, pyramid):
        assert torch.equal(own, ours)
    assert report.matched == len(state)
    assert (report.missing, report.unexpected, report.resized) == (0, 0, 0)
    assert report.fresh == len(network.state_dict()) - len(state)


def test_segresnet_decoder__is_filled_when_given_and_head_stays() -> None:
    encoder, state, manifest = segresnet_part()
    decoder = {k: v for k, v in encoder.net.state_dict().items() if k.startswith(("up_samples.", "up_layers."))}
    alone: Any = seeded(build_segresnet, 2, encoder=encoder.config(), out_channels=3)
    both: Any = seeded(build_segresnet, 2, encoder=encoder.config(), out_channels=3)
    load_pretrained(alone, state, manifest)
    report = load_pretrained(both, state, manifest, decoder_state=decoder)
    assert report.matched == len(state) + len(decoder)
    for key, value in both.state_dict().items():
        if key in decoder:
            assert torch.equal(value, decoder[key])
        else:
            assert torch.equal(value, alone.state_dict()[key])
    with pytest.raises(WeightsError, match=r"decoder weights do not fit.*missing"):
        load_pretrained(both, state, manifest, decoder_state=dict(list(decoder.items())[:-1]))


def test_whole_segresnet_state__ignores_the_decoder_group() -> None:
    encoder, state, manifest = segresnet_part()
    full = {k: v for k, v in encoder.net.state_dict().items() if not k.startswith("conv_final")}
    network = build_segresnet(encoder=encoder.config(), out_channels=2)
    assert load_pretrained(network, full, manifest).matched == len(state)


def test_unetr_encoder__gives_equal_hidden_states() -> None:
    encoder, state, manifest = vit_part()
    network: Any = seeded(build_unetr, 2, encoder=encoder.config(), out_channels=2, image_size=(48, 32, 16), feature_size=4).eval()
    report = load_pretrained(network, state, manifest)
    x = torch.randn(1, 1, 48, 32, 16)
    with torch.no_grad():
        last, hidden = network.vit(x)
        ours = encoder.eval().forward_features(x)
    torch.testing.assert_close(last, ours.tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(network.proj_feat(hidden[3]), ours.pyramid[3], atol=1e-5, rtol=1e-5)
    assert (report.matched, report.resized, report.missing) == (len(state), 0, 0)
    assert network(x).shape == (1, 2, 48, 32, 16)


def test_unetr_other_crop__resizes_positions_in_token_order() -> None:
    encoder, state, manifest = vit_part()
    grid = (3, 2, 1)
    ramp = torch.arange(3.0)[:, None, None].expand(grid).reshape(1, -1, 1).expand(1, 6, 24).clone()  # grows along X only
    state[POSITIONS] = ramp
    network: Any = build_unetr(encoder=encoder.config(), out_channels=2, image_size=(96, 32, 32), feature_size=4)
    report = load_pretrained(network, state, manifest)
    assert report.resized == 1
    table = network.vit.patch_embedding.position_embeddings[0, :, 0].reshape(6, 2, 2)
    expected = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.0])  # linear, cell centres aligned, edges held
    for y in range(2):
        for z in range(2):
            torch.testing.assert_close(table[:, y, z], expected)


def test_unused_cross_attention_norm__may_be_absent() -> None:
    encoder, state, manifest = vit_part()
    old = {k: v for k, v in state.items() if "norm_cross_attn" not in k}
    network = build_unetr(encoder=encoder.config(), out_channels=2, image_size=(48, 32, 16), feature_size=4)
    report = load_pretrained(network, old, manifest)
    assert report.missing == len(state) - len(old) == 24
    assert report.matched == len(old)


def test_mismatches__name_what_differs_and_change_nothing() -> None:
    encoder, state, manifest = segresnet_part()
    network = build_segresnet(encoder=encoder.config(), out_channels=2)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    key = next(iter(state))
    with pytest.raises(WeightsError, match=r"1 missing \(convInit"):
        load_pretrained(network, {k: v for k, v in state.items() if k != key}, manifest)
    with pytest.raises(WeightsError, match=r"1 unexpected \(stranger"):
        load_pretrained(network, {**state, "stranger": torch.zeros(1)}, manifest)
    _, wide_state, wide_manifest = segresnet_part(init_filters=16)
    with pytest.raises(WeightsError, match=r"of another shape \(convInit.*and \d+ more"):
        load_pretrained(network, wide_state, wide_manifest)
    _, two_state, two_manifest = segresnet_part(in_channels=2)
    with pytest.raises(WeightsError, match=r"take 2 input channel.*the network has 1"):
        load_pretrained(network, two_state, two_manifest)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_weights_of_another_network__say_which_network_fits() -> None:
    _, state, manifest = vit_part()
    network = build_segresnet(encoder={"name": "segresnet3d", "args": SEG}, out_channels=2)
    with pytest.raises(WeightsError, match=r"of monai.ViT .*choose network unetr"):
        load_pretrained(network, state, manifest)
    unetr = build_unetr(encoder={"name": "vit3d", "args": VIT}, out_channels=2, image_size=(16, 16, 16), feature_size=4)
    with pytest.raises(WeightsError, match=r"only a SegResNet or SwinUNETR takes a pretrained decoder, .* this is a UNETR"):
        load_pretrained(unetr, state, manifest, decoder_state={"up_layers.x": torch.zeros(1)})


def test_builders__refuse_what_cannot_be_built() -> None:
    vit = {"name": "vit3d", "args": VIT}
    with pytest.raises(RequestError, match=r'encoder is "vit3d".*choose network "unetr"'):
        build_segresnet(encoder=vit, out_channels=2)
    with pytest.raises(RequestError, match="fixed to patch size 16 and 12 layers"):
        build_unetr(encoder={"name": "vit3d", "args": {**VIT, "patch_size": 8}}, out_channels=2, image_size=(16, 16, 16))
    with pytest.raises(RequestError, match="every axis must be a multiple of 16; use 48x64x48"):
        build_unetr(encoder=vit, out_channels=2, image_size=(40, 56, 40))
    with pytest.raises(RequestError, match="multiple of 4; use 12x8x8"):
        build_segresnet(encoder={"name": "segresnet3d", "args": SEG}, out_channels=2, image_size=(10, 8, 8))


def test_head_prior__predicts_the_frequencies_before_training() -> None:
    segresnet: Any = build_segresnet(encoder={"name": "segresnet3d", "args": SEG}, out_channels=3)
    unetr: Any = build_unetr(encoder={"name": "vit3d", "args": VIT}, out_channels=3, image_size=(16, 16, 16), feature_size=4)
    for network, head in ((segresnet, segresnet.conv_final[2].conv), (unetr, unetr.out.conv.conv)):
        before = {k: v.clone() for k, v in network.state_dict().items()}
        set_head_prior(network, [0.9, 0.1, 0.0])
        changed = [k for k, v in network.state_dict().items() if not torch.equal(v, before[k])]
        assert len(changed) == 1
        torch.testing.assert_close(head.bias.softmax(0), torch.tensor([0.9, 0.1, 1e-4]) / 1.0001)
        torch.nn.init.zeros_(head.weight)
        p = network.eval()(torch.randn(1, 1, 16, 16, 16)).softmax(1)
        torch.testing.assert_close(p[:, 1], torch.full_like(p[:, 1], 0.1 / 1.0001))
    with pytest.raises(RequestError, match="no last 1x1 convolution with 5 outputs"):
        set_head_prior(segresnet, [0.2] * 5)


def test_encoder_parameters__are_exactly_the_pretrained_ones() -> None:
    _, state, _ = segresnet_part()
    network = build_segresnet(encoder={"name": "segresnet3d", "args": SEG}, out_channels=2)
    assert encoder_parameters(network) == set(state)


def swin_part(seed: int = 1) -> tuple[Swin3D, dict[str, Tensor], dict[str, Any]]:
    encoder = seeded(Swin3D, seed, **SWIN)
    state = {k: v for k, v in encoder.net.state_dict().items() if k.startswith("swinViT.")}
    manifest = {"library": encoder.library, "key_groups": encoder.key_groups, "encoder": encoder.config()}
    return encoder, state, manifest


def test_swin_encoder__gives_equal_states_and_the_decoder_goes_along_when_given() -> None:
    encoder, state, manifest = swin_part()
    decoder = {k: v for k, v in encoder.net.state_dict().items() if k.startswith(tuple(encoder.key_groups["decoder"]))}
    arguments = {"encoder": encoder.config(), "out_channels": 3, "image_size": (64, 32, 32)}
    alone, both = (seeded(build_swin_unetr, 2, **arguments).eval() for _ in range(2))
    report = load_pretrained(alone, state, manifest)
    assert (report.matched, report.missing, report.unexpected, report.resized) == (len(state), 0, 0, 0)
    assert report.fresh == len(alone.state_dict()) - len(state)
    assert load_pretrained(both, state, manifest, decoder_state=decoder).matched == len(state) + len(decoder)
    x = torch.randn(1, 1, 64, 32, 32)
    with torch.no_grad():
        output = encoder.eval()(x)
        for network in (alone, both):
            assert all(torch.equal(a, b) for a, b in zip(network.swinViT(x, True), output.pyramid, strict=True))
        both.out = torch.nn.Identity()
        assert torch.equal(both(x), encoder.forward_decoder(output.pyramid, x))
    assert encoder_parameters(alone) == {k for k, _ in encoder.net.named_parameters() if k.startswith("swinViT.")}


def test_swin_unetr__learns_all_of_its_parameters_and_takes_a_head_prior() -> None:
    network = seeded(build_swin_unetr, 2, encoder={"name": "swin3d", "args": SWIN}, out_channels=3)
    set_head_prior(network, [0.9, 0.09, 0.01])
    torch.testing.assert_close(network.out.conv.conv.bias.detach(), torch.tensor([0.9, 0.09, 0.01]).log())
    network(torch.randn(1, 1, 64, 32, 32)).square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_swin_unetr__refuses_other_crops_encoders_and_channels() -> None:
    with pytest.raises(RequestError, match=r"every axis must be a multiple of 32; use 64x64x32"):
        build_swin_unetr(encoder={"name": "swin3d", "args": SWIN}, out_channels=2, image_size=(48, 64, 32))
    with pytest.raises(RequestError, match="crop 32x32x32 voxels leaves one cell"):
        build_swin_unetr(encoder={"name": "swin3d", "args": SWIN}, out_channels=2, image_size=(32, 32, 32))
    with pytest.raises(RequestError, match='the encoder is "segresnet3d"; it is built around swin3d; choose network "segresnet"'):
        build_swin_unetr(encoder={"name": "segresnet3d", "args": SEG}, out_channels=2)
    _, state, manifest = swin_part()
    wide = build_swin_unetr(encoder={"name": "swin3d", "args": {**SWIN, "in_channels": 2}}, out_channels=2)
    with pytest.raises(WeightsError, match=r"the weights take 1 input channel\(s\), the network has 2"):
        load_pretrained(wide, state, manifest)
    with pytest.raises(WeightsError, match="choose network swin_unetr"):
        load_pretrained(build_segresnet(encoder={"name": "segresnet3d", "args": SEG}, out_channels=2), state, manifest)


def resenc_part(seed: int = 1, **changes: Any) -> tuple[ResEnc3D, dict[str, Tensor], dict[str, Any]]:
    encoder = seeded(ResEnc3D, seed, **{**RESENC, **changes})
    for name, parameter in encoder.named_parameters():  # a new network has zeros here
        if "conv2.norm.weight" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    state = {k: v for k, v in encoder.net.state_dict().items() if k.startswith("encoder.")}
    manifest = {"library": encoder.library, "key_groups": encoder.key_groups, "encoder": encoder.config()}
    return encoder, state, manifest


def test_resenc_encoder__gives_equal_maps_and_the_decoder_goes_along_when_given() -> None:
    encoder, state, manifest = resenc_part()
    decoder = {k: v for k, v in encoder.net.state_dict().items() if k.startswith("decoder.")}
    arguments = {"encoder": encoder.config(), "out_channels": 3, "image_size": (16, 24, 8)}
    alone, both = (seeded(build_resenc_unet, 2, **arguments).eval() for _ in range(2))
    report = load_pretrained(alone, state, manifest)
    assert (report.matched, report.missing, report.unexpected, report.resized) == (len(state), 0, 0, 0)
    assert report.fresh == len(alone.state_dict()) - len(state)
    assert load_pretrained(both, state, manifest, decoder_state=decoder).matched == len(state) + len(decoder)
    x = torch.randn(1, 1, 16, 24, 8)
    with torch.no_grad():
        output = encoder.eval()(x)
        for network in (alone, both):
            assert all(torch.equal(a, b) for a, b in zip(network.encode(x), output.pyramid, strict=True))
        finest = encoder.forward_decoder(output.pyramid)
        assert torch.equal(both(x), both.decoder.seg_layers[-1](finest)) and both(x).shape == (1, 3, 16, 24, 8)
        assert not torch.allclose(alone(x), both(x))
    assert encoder_parameters(alone) == set(state)
    with pytest.raises(WeightsError, match=r"decoder weights do not fit.*missing"):
        load_pretrained(both, state, manifest, decoder_state=dict(list(decoder.items())[:-1]))


def test_resenc_unet__learns_all_that_it_uses_and_takes_a_head_prior() -> None:
    network = seeded(build_resenc_unet, 2, encoder={"name": "resenc3d", "args": RESENC}, out_channels=3)
    set_head_prior(network, [0.9, 0.09, 0.01])
    torch.testing.assert_close(network.decoder.seg_layers[-1].bias.detach(), torch.tensor([0.9, 0.09, 0.01]).log())
    network(torch.randn(1, 1, 16, 24, 8)).square().sum().backward()
    unused = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert unused == ["decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"]
    assert unused == [name for name, parameter in network.named_parameters() if not parameter.requires_grad]


def test_resenc_unet__refuses_other_crops_encoders_and_channels() -> None:
    resenc = {"name": "resenc3d", "args": RESENC}
    with pytest.raises(RequestError, match=r"every axis must be a multiple of 4x4x2; use 12x24x8"):
        build_resenc_unet(encoder=resenc, out_channels=2, image_size=(10, 24, 7))
    with pytest.raises(RequestError, match=r"crop 4x4x2 voxels leaves one cell .*use 8 voxels or more"):
        build_resenc_unet(encoder=resenc, out_channels=2, image_size=(4, 4, 2))
    with pytest.raises(
        RequestError, match='the encoder is "resenc3d"; it is built around segresnet3d; choose network "resenc_unet"'
    ):
        build_segresnet(encoder=resenc, out_channels=2)
    _, state, manifest = resenc_part(in_channels=2)
    network = build_resenc_unet(encoder=resenc, out_channels=2)
    with pytest.raises(WeightsError, match=r"the weights take 2 input channel\(s\), the network has 1"):
        load_pretrained(network, state, manifest)
    with pytest.raises(WeightsError, match="choose network resenc_unet"):
        load_pretrained(build_segresnet(encoder={"name": "segresnet3d", "args": SEG}, out_channels=2), state, manifest)
