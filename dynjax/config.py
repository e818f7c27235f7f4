"""Configuration: frozen dataclasses. A row is a function that returns one `Config`; the command line overrides any
field of it."""

import dataclasses
from typing import Literal


class UserError(Exception):
    """Bad input from outside (an argument, a file, a row). Commands print it as one line and exit with status 2."""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """What happens to a training picture. All off: the picture as it is."""

    flip: bool = True
    """Mirror left and right, half of the time; digits never are."""
    crop: float = 0.5
    """Smallest side of the random crop, as a share of the picture, resized back; 1 turns cropping off."""
    colour: float = 0.25
    """Largest relative change of brightness, contrast and saturation; 0 turns it off."""
    pad: int = 0
    """Pad by so many black pixels on each side and crop the picture's size out of it, anywhere; masks are ignored
    there. He et al. 2016 train on CIFAR-10 with 4; 0 turns it off."""
    cutout: int = 0
    """Side in pixels of a square that takes the data's mean colour, its centre anywhere in the picture (DeVries and
    Taylor 2017: 16 on CIFAR-10); masks stay. 0 turns it off."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where pictures come from, and what belongs to them: a mask (segmentation) or one label (classification)."""

    name: str = "digits"
    """Masks: digits (embedded) | camvid | folder. Labels: digits8 (embedded) | mnist | fashion_mnist | cifar10 |
    class_folder. Either: tfds:NAME."""
    path: str = ""
    """Folder of the data set, or the .npz file of cifar10; not used by digits and digits8."""
    size: tuple[int, int] | None = None
    """Height and width in pixels that pictures are resized to; None keeps the pictures' own size, which must then be
    one."""
    classes: int = 0
    """Number of classes of a folder or TFDS set; 0 reads it from the data."""
    examples: int | None = None
    """Training scenes of digits, of which val and test have a tenth each; None is 2000. Of any other set: at most so
    many training examples, spread evenly over it; None is all of them."""
    difficulty: float = 0.5
    """0 to 1, digits only: less contrast, more clutter and overlap."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with files that cannot be read: stop and name them all, or leave them out and say how many."""
    augment: AugmentConfig = AugmentConfig()


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """A residual U-Net and the dynamics put into it."""

    family: Literal["unet"] = "unet"
    widths: tuple[int, ...] = (32, 48, 64, 96)
    """Channels of each level, finest first."""
    blocks: tuple[int, ...] = (1, 1, 1, 1)
    """Residual blocks of each level, in the encoder and again in the decoder."""
    stem_stride: int = 2
    """The finest level works at 1/stem_stride of the picture."""
    dynamics: Literal["static", "tiles", "skip", "select"] = "static"
    gate: Literal["learned", "random"] = "learned"
    tiles: tuple[int, ...] = (16, 8, 8)
    """Side of a tile at each level, in pixels of that level's map; levels beyond stay static."""


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """A residual network for small pictures and the dynamics put into its blocks."""

    family: Literal["resnet"] = "resnet"
    stem_stride: int = 1
    """The first stage works at 1/stem_stride of the picture: 1 or 2."""
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of each stage; each further stage works at half the resolution of the one before."""
    blocks: tuple[int, ...] = (3, 3, 3)
    """Residual blocks of each stage."""
    dynamics: Literal["static", "skip", "policy", "reinforce", "channels", "slices", "exits"] = "static"
    """skip: a gate before each block; policy: one network decides all blocks, and reinforce is the same trained by
    REINFORCE; channels: groups of hidden channels; slices: one of several hidden widths; exits: a head after each
    stage. All per picture."""
    gate: Literal["learned", "random"] = "learned"
    groups: int = 4
    """Groups of hidden channels, or slices of the hidden width."""


@dataclasses.dataclass(frozen=True)
class MSDNetConfig:
    """A multi-scale dense network with exits."""

    family: Literal["msdnet"] = "msdnet"
    scales: int = 3
    """Resolutions, each half of the one before."""
    channels: int = 16
    """Channels of the finest scale after the first layer; a coarser one has twice as many."""
    growth: int = 6
    """Channels that a layer adds to the finest scale; twice as many to each coarser one."""
    blocks: int = 5
    """Blocks, each ending in an exit."""
    base: int = 4
    """Layers of the first block."""
    step: int = 2
    """Layers of each further block."""
    bottleneck: bool = True
    """1x1 convolutions before the 3x3 ones."""
    dynamics: Literal["static", "exits"] = "static"
    """static: only the last exit is there."""
    gate: Literal["learned", "random"] = "learned"


@dataclasses.dataclass(frozen=True)
class RoutedConfig:
    """A grid of scales and layers through which every picture takes its own paths."""

    family: Literal["routed"] = "routed"
    task: Literal["classification", "segmentation"] = "classification"
    """One label for the picture, or for every pixel."""
    channels: int = 16
    """Channels of the finest scale; each coarser one has twice as many."""
    scales: int = 3
    """Resolutions, each half of the one before."""
    layers: int = 4
    """Layers of cells, at least as many as scales: each reaches one scale more."""
    stem_stride: int = 1
    """The finest scale works at 1/stem_stride of the picture: 1, 2 or 4."""
    operation: Literal["residual", "separable"] = "residual"
    """What a cell does: a residual block of two 3x3 convolutions, or of two separable ones as in the paper, which are
    slow on CPUs."""
    dynamics: Literal["static", "gates", "single", "sandwich"] = "static"
    """static: all paths open. gates: each cell has a gate for its paths. single, sandwich: trained by sampling paths,
    one through the net, or all, none and some of them."""
    gate: Literal["learned", "random"] = "learned"


@dataclasses.dataclass(frozen=True)
class RANetConfig:
    """A network of sub-networks for rising resolutions, with exits; the coarsest is run first."""

    family: Literal["ranet"] = "ranet"
    scales: int = 3
    """Sub-networks; the last works at the picture's resolution, each one before at half of the next one's."""
    channels: int = 16
    """Channels of the finest base map; each coarser one has twice as many."""
    growth: int = 6
    """Channels that a layer of the finest sub-network adds, at least 4; twice as many in each coarser one."""
    blocks: int = 2
    """Dense blocks of the coarsest sub-network, each ending in an exit."""
    step: int = 2
    """Further blocks, and exits, that each finer sub-network has behind those that are fused with the coarser one's."""
    layers: int = 4
    """Layers of a dense block."""
    dynamics: Literal["static", "exits"] = "static"
    """static: only the last exit is there."""
    gate: Literal["learned", "random"] = "learned"


@dataclasses.dataclass(frozen=True)
class HaltConfig:
    """A residual block applied again and again, until a halting unit says stop."""

    family: Literal["halting"] = "halting"
    channels: int = 32
    halvings: int = 1
    """How often the stem halves the picture's resolution."""
    steps: int = 8
    """Most applications of the block; the static twin always has as many."""
    dynamics: Literal["static", "act", "sact", "pondernet"] = "static"
    """act: adaptive computation time per picture; sact: per tile; pondernet: trained on the prediction of every
    step."""
    tile: int = 4
    """Side of a tile of sact, in pixels of the block's map."""
    gate: Literal["learned", "random"] = "learned"


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A small vision transformer whose MLPs are mixtures of experts."""

    family: Literal["moe"] = "moe"
    patch: int = 4
    """Side in pixels of the patches that are the tokens."""
    width: int = 64
    """Features of a token."""
    depth: int = 4
    """Blocks of attention and experts."""
    heads: int = 4
    hidden: int = 128
    """Hidden features of an expert; the static twin's MLP has `top` times as many."""
    experts: int = 8
    top: int = 2
    """The most experts that a token takes."""
    least: int = 1
    """The experts that a token takes at any budget; with `top`, every token costs the same."""
    dynamics: Literal["static", "experts"] = "static"
    gate: Literal["learned", "random"] = "learned"


@dataclasses.dataclass(frozen=True)
class DynamicConvNetConfig:
    """A small residual network whose 3x3 convolutions have kernels of the input."""

    family: Literal["dynamicconvnet"] = "dynamicconvnet"
    stem_stride: int = 1
    """The first stage works at 1/stem_stride of the picture: 1 or 2."""
    widths: tuple[int, ...] = (16, 24, 48)
    """Channels of each stage; each further stage works at half the resolution of the one before."""
    blocks: tuple[int, ...] = (1, 1, 1)
    """Residual blocks of each stage."""
    dynamics: Literal["static", "condconv", "dyconv", "odconv", "hyper", "involution", "ddf"] = "static"
    """condconv, dyconv, odconv: kernels mixed for each picture; hyper: generated for it; involution, ddf: for each
    pixel."""
    kernels: int = 4
    """Kernels that are mixed."""
    gate: Literal["learned", "random"] = "learned"


@dataclasses.dataclass(frozen=True)
class PixelCNNConfig:
    """A gated PixelCNN, which draws a picture pixel after pixel."""

    family: Literal["pixelcnn"] = "pixelcnn"
    shape: tuple[int, int, int] = (28, 28, 1)
    """Height, width and channels (1: grey, 3: colours) of the pictures."""
    values: int = 2
    """Values of a channel: 2 is black and white, 256 are all bytes."""
    likelihood: Literal["categorical", "logistic"] = "categorical"
    """categorical: a softmax over all values, of one channel; logistic: a mixture of rounded logistic distributions."""
    components: int = 5
    """Of the mixture of logistics."""
    features: int = 32
    layers: int = 8
    embed: bool = False
    """Values are names (codes), not brightness."""
    conditional: bool = False
    """Pictures can be asked for by their label."""
    dynamics: Literal["static"] = "static"
    """The dynamics are in how it is sampled."""
    gate: Literal["learned"] = "learned"


@dataclasses.dataclass(frozen=True)
class PixelTransformerConfig:
    """A causal transformer over pixels, which draws a picture pixel after pixel."""

    family: Literal["pixeltransformer"] = "pixeltransformer"
    shape: tuple[int, int, int] = (28, 28, 1)
    """Height, width and channels (1: grey, 3: colours) of the pictures."""
    values: int = 2
    """Values of a channel: 2 is black and white, 256 are all bytes."""
    likelihood: Literal["categorical", "logistic"] = "categorical"
    """categorical: a softmax over all values, of one channel; logistic: a mixture of rounded logistic distributions."""
    components: int = 5
    """Of the mixture of logistics."""
    features: int = 64
    layers: int = 4
    heads: int = 4
    embed: bool = False
    """Values are names (codes), not brightness."""
    conditional: bool = False
    """Pictures can be asked for by their label."""
    dynamics: Literal["static", "exits"] = "static"
    """static: dynamics are in how it is sampled; exits: a pixel takes no further block once its prediction is sure."""
    gate: Literal["learned", "random"] = "learned"
    """learned: by the entropy of the prediction; random: the control."""


@dataclasses.dataclass(frozen=True)
class NextScaleConfig:
    """A picture from coarse to fine: the coarsest pixel by pixel, a finer one in three steps, rich or plain by tile."""

    family: Literal["nextscale"] = "nextscale"
    shape: tuple[int, int, int] = (28, 28, 1)
    """Height, width and channels (1: grey, 3: colours) of the pictures."""
    values: int = 2
    """Values of a channel: 2 is black and white, 256 are all bytes."""
    likelihood: Literal["categorical", "logistic"] = "categorical"
    """categorical: a softmax over all values, of one channel; logistic: a mixture of rounded logistic distributions."""
    components: int = 5
    """Of the mixture of logistics."""
    scales: int = 3
    """Resolutions; each coarser one has every other row and column of the next finer one."""
    coarse_features: int = 24
    """Of the PixelCNN that draws the coarsest."""
    coarse_layers: int = 4
    reach: int = 3
    """Both networks look at so many pixels of the coarser picture to every side."""
    features: int = 96
    """Of the rich network."""
    blocks: int = 3
    """Residual blocks of the rich network."""
    plain: int = 16
    """Hidden features of the plain network."""
    conditional: bool = False
    """Pictures can be asked for by their label."""
    dynamics: Literal["static", "tiles"] = "tiles"
    """static: the rich network everywhere, and no plain one; tiles: the gate decides for each tile."""
    gate: Literal["learned", "random", "grid"] = "learned"
    """learned: the rich network goes where the plain one's prediction has the most entropy; random: anywhere; grid: to
    tiles spread evenly."""
    tile: int = 2
    """Side of a tile in pixels of the coarser picture."""


@dataclasses.dataclass(frozen=True)
class VQVAEConfig:
    """An autoencoder whose picture in between is one of codes: names of vectors, fewer than there are pixels."""

    family: Literal["vqvae"] = "vqvae"
    shape: tuple[int, int, int] = (28, 28, 1)
    """Height, width and channels (1: grey, 3: colours) of the pictures."""
    halvings: int = 2
    """The grid of codes has 1/2**halvings of the picture's rows and columns."""
    codes: int = 64
    """Vectors in the codebook."""
    code_features: int = 8
    """Numbers of a vector."""
    features: int = 32
    blocks: int = 1
    """Residual blocks of the encoder, and of the decoder, at the grid's resolution."""
    commitment: float = 0.25
    """Weight of the loss that keeps the encoder near the vectors that it chose."""
    dynamics: Literal["static"] = "static"
    gate: Literal["learned"] = "learned"


@dataclasses.dataclass(frozen=True)
class CodesConfig:
    """An autoregressive model of a trained VQ-VAE's codes; shape and values of `prior` are those of the codes."""

    family: Literal["codes"] = "codes"
    vqvae: VQVAEConfig = VQVAEConfig()
    """Must be that of the workdir in --init-from."""
    prior: PixelCNNConfig | PixelTransformerConfig = PixelCNNConfig()
    dynamics: Literal["static"] = "static"
    """The dynamics are in how it is sampled."""
    gate: Literal["learned"] = "learned"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the pictures."""
        return self.vqvae.shape


ModelConfig = (
    UNetConfig
    | ResNetConfig
    | MSDNetConfig
    | RoutedConfig
    | RANetConfig
    | HaltConfig
    | MoEConfig
    | DynamicConvNetConfig
    | PixelCNNConfig
    | PixelTransformerConfig
    | NextScaleConfig
    | VQVAEConfig
    | CodesConfig
)
"""One dataclass for each family in `dynjax.models`. All have `family`, `dynamics` ("static" is the twin) and `gate`."""


@dataclasses.dataclass(frozen=True)
class BudgetConfig:
    """How much compute the model may spend, as a share of the MACs of its static twin."""

    target: float = 0.5
    """Share of the MACs, in (0, 1], that training steers to."""
    sampled: bool = True
    """Draw a new target from [target, 1] at every step, low ones more often, so that one checkpoint serves every budget
    from target up."""
    weight: float = 10.0
    """Weight of the budget loss."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    cross_entropy: float = 1.0
    dice: float = 0.0
    """Weight of the soft Dice loss."""
    class_weights: Literal["none", "sqrt", "inverse"] = "none"
    """Weight each class by nothing, by 1/sqrt(frequency) or by 1/frequency, measured on the training masks; of
    segmentation. Options that a row does not use are refused."""
    label_smoothing: float = 0.0
    """Share of the label that is spread over all classes."""
    load_balance: float = 0.0
    """Weight of the loss that has all branches and experts used alike."""
    router_z: float = 0.0
    """Weight of the loss that keeps the logits of experts' routers small."""
    ponder: float = 0.01
    """Weight of PonderNet's divergence from its prior, whose mean is the budget's share of the steps."""
    reinforce: float = 1.0
    """Weight of the loss of a policy that is trained by REINFORCE."""
    wrong: float = 1.0
    """Penalty of a wrong prediction in its reward: the larger, the more blocks it keeps."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 2e-3
    warmup: float = 0.05
    """Share of the steps in which the rate rises; then it falls by a cosine to 0."""
    weight_decay: float = 1e-4
    """AdamW; not on biases, norms or gates."""
    gate_learning_rate: float = 0.5
    """Learning rate of the gates as a multiple of the others'."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    ema: float = 0.99
    """Decay of the averaged parameters that are evaluated and deployed; 0 turns it off. Batch statistics are those of
    the parameters themselves, which at the end, where the rate falls to 0, are nearly the averaged ones."""
    accumulate: int = 1
    """Gradient accumulation: the batch is cut into this many parts."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One row: everything that a training run depends on."""

    row: str
    """Name of the row; set by the row, not by hand."""
    data: DataConfig = DataConfig()
    model: ModelConfig = UNetConfig()
    budget: BudgetConfig = BudgetConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = 1000
    batch_size: int = 8
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes in bfloat16 and keeps parameters in float32."""
    checkpoint_every: int = 200
    evaluate_every: int = 200
    """Steps between evaluations on val; 0 evaluates only at the end."""
    init_from: str = ""
    """Workdir of a trained static twin whose weights go under the wrappers (two-stage training)."""
