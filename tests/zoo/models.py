"""The table of models that the library was tried on: each made of a configuration, with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import ibp_triton as ibp
from tests.zoo import own

Make = Callable[[], nn.Module]


@dataclass(frozen=True)
class Case:
    """One model: how it is made, what it is called with and what is asked of it."""

    name: str
    family: str
    make: Make
    shape: tuple[int, ...] = (3, 3, 32, 32)
    network: Mapping[str, Any] = field(default_factory=dict)  # keywords of Network
    extra: Callable[[], dict[str, Tensor]] = dict  # the model's other inputs
    single: str = ""  # what in it rounds to float32 even of a float64 model
    sloped: str = ""  # why autograd's gradient is, by intention, not the slope of what the model computes

    @property
    def tolerance(self) -> float:
        """Of gradients, relative to the largest entry: a thousand roundings of the coarsest dtype inside."""
        return 1e-5 if self.single else 1e-9

    @property
    def title(self) -> str:
        """Whose it is and what it is called."""
        return f"{self.family}: {self.name}"

    def build(self) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
        """The model in train mode and float64, x, labels and two tangents."""
        torch.manual_seed(0)
        model = self.make().double().train()
        with torch.no_grad():
            for p in model.parameters():  # what starts at zero, as a last scale does, hides what is behind it
                p.add_(0.05 * torch.randn_like(p))
        x = torch.randn(self.shape, dtype=torch.float64)
        tau = torch.randn(2, *self.shape, dtype=torch.float64)
        return model, x, torch.tensor([0, 4, 2]), tau

    def wrapped(self, model: nn.Module) -> ibp.Network:
        """The model as a Network."""
        return ibp.Network(model, **self.network)


def _own(name: str, make: Make, shape: tuple[int, ...], **more: Any) -> Case:
    return Case(name, "own", make, shape, **more)


def _timm(name: str, title: str = "", **settings: Any) -> Case:
    more = {key: settings.pop(key) for key in ("shape", "single") if key in settings}
    return Case(title or name.split(".")[-1], "timm", lambda: _made_by_timm(name, dict(settings)), **more)


def _made_by_timm(name: str, settings: dict[str, Any]) -> nn.Module:
    timm = importlib.import_module("timm")
    if "." not in name:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=own.CLASSES, **settings)
        return model
    place, kind = name.split(".")
    module = importlib.import_module("timm.models." + place)
    made: nn.Module = getattr(module, kind)(num_classes=own.CLASSES, **settings)
    return made


def _res_mlp() -> nn.Module:
    mixer = importlib.import_module("timm.models.mlp_mixer")
    settings = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "num_blocks": 2}
    model: nn.Module = mixer.MlpMixer(
        num_classes=own.CLASSES, block_layer=mixer.ResBlock, norm_layer=mixer.Affine, mlp_ratio=4, **settings
    )
    return model


def _axial() -> nn.Module:
    made: nn.Module = importlib.import_module("tests.zoo.einsteins").AxialAttention()
    return made


def _vgg() -> nn.Module:
    """VGG with batch norm, narrow: torchvision's own class has a classifier of a hundred million parameters."""
    vgg = importlib.import_module("torchvision.models.vgg")
    features = vgg.make_layers([8, "M", 12, "M", 16, 16, "M"], batch_norm=True)
    head = [nn.Linear(256, 24), nn.ReLU(True), nn.Dropout(0.1), nn.Linear(24, own.CLASSES)]
    return nn.Sequential(features, nn.Flatten(), *head)


def _vision(name: str, shape: tuple[int, ...] = (3, 3, 32, 32), **settings: Any) -> Case:
    def make() -> nn.Module:
        place = importlib.import_module("torchvision.models")
        model: nn.Module = getattr(place, name)(num_classes=own.CLASSES, **settings)
        return model

    return Case(name, "torchvision", make, shape)


def _hub(model: str, config: str, shape: tuple[int, ...], case: Mapping[str, Any], **settings: Any) -> Case:
    def make() -> nn.Module:
        transformers = importlib.import_module("transformers")
        made: nn.Module = getattr(transformers, model)(
            getattr(transformers, config)(num_labels=own.CLASSES, **settings)
        )
        return made

    return Case(model, "transformers", make, shape, **case)


def _mask() -> dict[str, Tensor]:
    """The second sample has three tokens, the others four."""
    mask = torch.ones(3, 4, dtype=torch.long)
    mask[1, 3] = 0
    return {"attention_mask": mask}


TEXT: dict[str, Any] = {"network": {"x": "inputs_embeds"}, "extra": _mask}
IMAGES: dict[str, Any] = {"network": {"x": "pixel_values"}}
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
SHORT: dict[str, Any] = {**SMALL, "num_hidden_layers": 2, "max_position_embeddings": 8, "vocab_size": 11}

THIN = {"channel_multiplier": 0.1, "depth_multiplier": 0.1, "shape": (3, 3, 64, 64)}
STRAIGHT = "its rounding hands derivatives straight through"
POWER = "its power iteration is a constant to autograd"
MIDDLE, SMALL_IMAGE = (3, 3, 64, 64), (3, 3, 16, 16)
SEQUENCE, IMAGE, GREY = (3, 4, 6), (3, 3, 8, 8), (3, 1, 8, 8)
OWN = [
    _own("VisionTransformer", own.VisionTransformer, IMAGE),
    _own("RotaryDecoder", own.RotaryDecoder, (3, 5, 16)),
    _own("RNN", lambda: own.Recurrent(nn.RNN), SEQUENCE),
    _own("LSTM", lambda: own.Recurrent(nn.LSTM, num_layers=2, bidirectional=True, dropout=0.2), SEQUENCE),
    _own("GRU", lambda: own.Recurrent(nn.GRU), SEQUENCE),
    _own("WaveClassifier", own.WaveClassifier, (3, 1, 24)),
    _own("Spectrogram", own.Spectrogram, (3, 1, 64)),
    _own("Volumes", own.Volumes, (3, 1, 4, 4, 4)),
    _own("SplineNet", own.SplineNet, (3, 8)),
    _own("Experts", own.Experts, SEQUENCE),
    _own("FakeQuantised", own.FakeQuantised, GREY, sloped=STRAIGHT),
    _own("Variational", own.Variational, (3, 1, 4, 4)),
    _own("WeightStandardised", own.WeightStandardised, IMAGE),
    _own("Equilibrium", own.Equilibrium, (3, 1, 4, 4), sloped=POWER),
    _own("MessagePassing", own.MessagePassing, SEQUENCE),
    _own("LowRank", own.LowRank, (3, 1, 4, 4)),
    _own("SpectralConv", own.SpectralConv, GREY),
    _own("Codebook", own.Codebook, SEQUENCE, sloped=STRAIGHT),
    _own("Rotations", own.Rotations, GREY),
    _own("GatedMixer", own.GatedMixer, SEQUENCE),
    _own("HyperNetwork", own.HyperNetwork, SEQUENCE),
    _own("NeuralField", own.NeuralField, SEQUENCE),
    _own("Capsules", own.Capsules, SEQUENCE),
    _own("StateSpace", own.StateSpace, SEQUENCE),
]
TIMM = [
    _timm("resnet10t", channels=(8, 12, 16, 24)),
    _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 16)),
    _timm("mobilenetv3_small_050", drop_rate=0.1, shape=MIDDLE),
    _timm("efficientnet._gen_efficientnet_lite", "efficientnet_lite0", variant="efficientnet_lite0", **THIN),
    _timm("efficientnet._gen_efficientnet", "efficientnet_b0", variant="efficientnet_b0", **THIN, drop_path_rate=0.1),
    _timm("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, shape=SMALL_IMAGE),
    _timm("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(2, 1), num_heads=(2, 2)),
    _timm("levit_128s", img_size=64, embed_dim=(16,) * 3, key_dim=8, num_heads=(2,) * 3, depth=(1,) * 3, shape=MIDDLE),
    _timm("mlp_mixer.MlpMixer", img_size=32, patch_size=16, embed_dim=16, num_blocks=2),
    _timm("densenet121", growth_rate=4, block_config=(2, 2)),
    _timm("regnetx_002", shape=MIDDLE),
    Case("ResMLP", "timm", _res_mlp),
    _timm("metaformer.MetaFormer", depths=(1, 1, 1, 1), dims=(8, 8, 12, 16)),
    _timm("test_coatnet", img_size=32),
    _timm("xcit_nano_12_p8_224", img_size=32, embed_dim=16, depth=2, num_heads=2, cls_attn_layers=1),
    _timm("maxvit_nano_rw_256", img_size=64, embed_dim=(32, 32), depths=(1, 1), stem_width=8, shape=MIDDLE),
    _timm("eva02_tiny_patch14_224", img_size=28, embed_dim=16, depth=2, num_heads=2, shape=(3, 3, 28, 28)),
    _timm("cait_xxs24_224", img_size=32, embed_dim=16, depth=2, num_heads=2),
    _timm(
        "twins_svt_small", img_size=64, depths=(1,) * 4, embed_dims=(8, 8, 16, 16), num_heads=(1, 2, 2, 2), shape=MIDDLE
    ),
    _timm("convit_tiny", img_size=32, embed_dim=16, depth=2, num_heads=2),
    _timm("swinv2_tiny_window8_256", img_size=32, window_size=4, embed_dim=8, depths=(2, 1), num_heads=(2, 2)),
    _timm("hiera_tiny_224", img_size=64, embed_dim=8, shape=MIDDLE),
    _timm("test_byobnet"),
    _timm("test_nfnet"),
    _timm("test_mambaout"),
    _timm("test_efficientnet_evos", single="variances in float32"),
    _timm("test_vit_relpos", img_size=32),
    _timm("test_vit4", img_size=32),
]
VISION = [
    _vision("resnet18"),
    _vision("mobilenet_v2", width_mult=0.25, shape=(3, 3, 64, 64)),
    _vision("SwinTransformer", patch_size=[4, 4], embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=[4, 4]),
    _vision(
        "VisionTransformer",
        shape=(3, 3, 16, 16),
        image_size=16,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=24,
    ),
    _vision("squeezenet1_1", shape=(3, 3, 48, 48)),
    _vision("shufflenet_v2_x0_5", shape=(3, 3, 64, 64)),
    Case("vgg11_bn", "torchvision", _vgg),
]
HUB = [
    _hub("BertForSequenceClassification", "BertConfig", (3, 4, 16), TEXT, **SHORT),
    _hub(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        (3, 4, 16),
        TEXT,
        dim=16,
        hidden_dim=24,
        n_layers=2,
        n_heads=2,
        max_position_embeddings=8,
        vocab_size=11,
    ),
    _hub(
        "GPT2ForSequenceClassification",
        "GPT2Config",
        (3, 4, 16),
        TEXT,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=8,
        vocab_size=11,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    _hub(
        "LlamaForSequenceClassification",
        "LlamaConfig",
        (3, 4, 16),
        {**TEXT, "single": "its norms compute in float32"},
        **SHORT,
        num_key_value_heads=1,
        pad_token_id=0,
    ),
    _hub(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        (3, 4, 16),
        TEXT,
        **SHORT,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=4,
    ),
    _hub(
        "XLNetForSequenceClassification",
        "XLNetConfig",
        (3, 4, 16),
        TEXT,
        d_model=16,
        n_layer=2,
        n_head=2,
        d_inner=24,
        vocab_size=11,
    ),
    _hub(
        "GPTNeoXForSequenceClassification",
        "GPTNeoXConfig",
        (3, 4, 16),
        TEXT,
        **SHORT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    _hub(
        "FNetForSequenceClassification",
        "FNetConfig",
        (3, 4, 16),
        {"network": {"x": "inputs_embeds"}},
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=24,
        vocab_size=11,
        max_position_embeddings=8,
        type_vocab_size=2,
    ),
    _hub(
        "SegformerForImageClassification",
        "SegformerConfig",
        (3, 3, 32, 32),
        IMAGES,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
    ),
    _hub(
        "ViTForImageClassification",
        "ViTConfig",
        (3, 3, 8, 8),
        IMAGES,
        **SMALL,
        num_hidden_layers=2,
        image_size=8,
        patch_size=4,
    ),
    _hub(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        (3, 3, 32, 32),
        IMAGES,
        hidden_sizes=[8, 8, 12, 16],
        depths=[1, 1, 1, 1],
        drop_path_rate=0.1,
    ),
]
EINOPS = [Case("AxialAttention", "einops", _axial, (3, 3, 8, 8))]
CASES = [*OWN, *EINOPS, *TIMM, *VISION, *HUB]
