"""Configuration: frozen dataclasses. A row is a function that returns one `Config`; the command line overrides any
field of it."""

import dataclasses
from typing import ClassVar, Generic, Literal, Protocol, TypeVar, runtime_checkable


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
    """Masks: digits (embedded) | camvid | folder | isbi_em | aerial_roads. Labels: digits8 (embedded) | mnist |
    fashion_mnist | cifar10 | class_folder. Either: tfds:NAME."""
    path: str = ""
    """Folder of the data set, or the .npz file of cifar10; not used by digits and digits8."""
    size: tuple[int, int] | None = None
    """Height and width in pixels that pictures are resized to; None keeps the pictures' own size, which must then be
    one, unless `crop` is given."""
    crop: tuple[int, int] | None = None
    """Height and width in pixels of windows that pictures with masks are cut into, after `size` where both are given:
    training draws one from each picture, and every pixel of val and test counts once. None takes whole pictures."""
    masks: Literal["ids", "binary", "colours"] = "ids"
    """What masks of a folder hold: class ids; 0 and 255, for a background and a foreground; or the colours of its
    classes.txt."""
    weak: Literal["full", "points", "scribbles", "tags"] = "full"
    """What is left of training masks from files: everything; of each region a point or a scribble, the rest ignored;
    or only which classes a picture has (`loss.tags`)."""
    labelled: str = ""
    """How many training pictures keep their labels, as a share ("1/8") or a number ("46"); the others are left out,
    unless `loss.consistency` learns from them. Empty: all of them."""
    classes: int = 0
    """Number of classes of a folder or TFDS set; 0 reads it from the data, or from a folder's classes.txt. Of digits:
    11, or, with classes that differ in colour and texture too, 21, 31, ..., 101, 201, ..., 1001; 0 is 11."""
    examples: int | None = None
    """Training scenes of digits, of which val and test have a tenth each; None is 2000. Of any other set: at most so
    many training examples, spread evenly over it; None is all of them."""
    difficulty: float = 0.5
    """0 to 1, digits only: less contrast, more clutter and overlap."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with files that cannot be read: stop and name them all, or leave them out and say how many."""
    augment: AugmentConfig = AugmentConfig()


@dataclasses.dataclass(frozen=True)
class BudgetConfig:
    """How much compute the model may spend, as a share of its MACs with everything kept, or with the largest of what is
    chosen from everywhere: of most models those of the static twin."""

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
    focal: float = 0.0
    """Weight of the focal loss, its exponent 2."""
    lovasz: float = 0.0
    """Weight of the Lovász-softmax loss, which stands for 1 - mIoU. It sorts all pixels for every class in the batch,
    which takes a CPU long."""
    boundary: float = 0.0
    """Weight of the cross-entropy in which pixels on a border of classes count 11 times, and less with the distance
    from it, up to 15 pixels."""
    one_vs_all: float = 0.0
    """Weight of the binary cross-entropy of every class against all others. The prediction stays the largest logit."""
    tags: float = 0.0
    """Weight of the loss of which classes a picture has, by the largest logits of its pixels: all that masks of
    `data.weak` tags say."""
    consistency: float = 0.0
    """Weight of the loss of pictures without labels (`data.labelled`), or of those that are labelled weakly: changed
    strongly, each is to be what the averaged model sees in it as it is. 0 leaves them out."""
    confidence: float = 0.95
    """Probability from which on the averaged model's class of a pixel counts in that loss."""
    class_weights: Literal["none", "sqrt", "inverse"] = "none"
    """Weight each class by nothing, by 1/sqrt(frequency) or by 1/frequency, measured on the training masks; of
    segmentation, in all its losses but dice and lovasz. Options that a row does not use are refused."""
    label_smoothing: float = 0.0
    """Share of the label that is spread over all classes, in cross_entropy and boundary."""
    load_balance: float = 0.0
    """Weight of the loss that has all branches and experts used alike."""
    router_z: float = 0.0
    """Weight of the loss that keeps the logits of experts' routers small."""
    presence: float = 1.0
    """Weight of the binary cross-entropy from which a shortlist learns which classes a picture has."""
    ponder: float = 0.01
    """Weight of PonderNet's divergence from its prior, whose mean is the budget's share of the steps."""
    reinforce: float = 1.0
    """Weight of the loss of a policy that is trained by REINFORCE."""
    wrong: float = 1.0
    """Penalty of a wrong prediction in its reward: the larger, the more blocks it keeps."""
    adversarial: Literal["relativistic", "non_saturating", "hinge", "wasserstein"] = "relativistic"
    """What generator and discriminator play for; relativistic is R3GAN's, wasserstein WGAN-GP's."""
    gradient_penalty: float = 5.0
    """Weight of the penalty of the discriminator's steepness (R1 and R2, R1, or WGAN-GP's)."""
    augment: float = 0.0
    """Strength, 0 to 1, of the differentiable augmentation of all that the discriminator looks at; 0 turns it off."""
    distillation: float = 10.0
    """Weight of the loss that has pictures of reduced compute be like those of all of it."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 2e-3
    warmup: float = 0.05
    """Share of the steps in which the rate rises; then it falls by a cosine to 0 (`falls`)."""
    weight_decay: float = 1e-4
    """AdamW; not on biases, norms or gates."""
    gate_learning_rate: float = 0.5
    """Learning rate of the gates as a multiple of the others'."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    momentum: float = 0.9
    """Adam's beta 1, decay of the mean of the gradients; adversarial training has 0."""
    decay: float = 0.999
    """Adam's beta 2, decay of the mean of their squares."""
    falls: bool = True
    """False keeps the learning rate where the warm-up ends."""
    ema: float = 0.99
    """Decay of the averaged parameters that are evaluated and deployed; 0 turns it off. Batch statistics are those of
    the parameters themselves, which at the end, where the rate falls to 0, are nearly the averaged ones."""
    accumulate: int = 1
    """Gradient accumulation: the batch is cut into this many parts."""


@runtime_checkable
class ModelConfig(Protocol):
    """A frozen dataclass that says of a model all that building it takes; see `dynjax.models.registry`."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]

    @property
    def family(self) -> str:
        """Name of the family of models, which is registered under it."""


Model = TypeVar("Model", bound=ModelConfig)


@dataclasses.dataclass(frozen=True)
class Config(Generic[Model]):
    """One row: everything that a training run depends on."""

    row: str
    """Name of the row; set by the row, not by hand."""
    model: Model
    data: DataConfig = DataConfig()
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
    features: Literal["classifier", "efficientnet_lite0", "inception"] = "classifier"
    """By whose features drawn pictures are compared with real ones: a small classifier that is trained on the same set,
    a network trained on ImageNet (the extra `pretrained`), or Inception."""
    features_path: str = ""
    """File of Inception's weights."""
    init_from: str = ""
    """Workdir of a trained static twin whose weights go under the wrappers (two-stage training)."""
