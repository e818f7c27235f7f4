"""Model families: one file each, with its configuration beside it; all are built alike."""

from dynjax.models.registry import (
    FAMILIES,
    Family,
    base_of,
    build,
    check,
    describe,
    difference,
    dynamics_of,
    is_static,
    register,
    static_twin,
    task_of,
    tiny,
    uses,
)

from dynjax.models import (  # isort: skip
    backbones,
    codes,
    dense,
    dynamicconvnet,
    dynamics,
    gan,
    halting,
    heads,
    moe,
    msdnet,
    nextscale,
    pixelcnn,
    pixeltransformer,
    ranet,
    resnet,
    routed,
    vae,
    vqvae,
)
