"""A network of openai/guided-diffusion, from your clone and checkpoint: eps on its own table of noise levels.

--model 'examples/adapters/guided_diffusion.py:load(clone=PATH,checkpoint=FILE.pt,flags=[["image_size",256],...])'
`flags` are those of its scripts, in pairs.
Written from the repository's interface; not run here, where no clone was at hand: `evalbench check` tells.
"""

import torch

from evalbench.models.adapter import Adapter, use_clone
from evalbench.paths import VPDiscrete


def load(clone, checkpoint, flags):
    """The adapter."""
    use_clone(clone)
    from guided_diffusion import script_util

    facts = script_util.model_and_diffusion_defaults() | dict(flags)
    net, diffusion = script_util.create_model_and_diffusion(**facts)
    net.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    table, n, side = tuple(diffusion.alphas_cumprod.tolist()), len(diffusion.alphas_cumprod), facts["image_size"]
    call = lambda net, x, step, k: net(x, step, y=k)[:, :3]  # noqa: E731 - what it learned of the variance follows
    path = VPDiscrete(t_end=1 / n, alphas_cumprod=table)
    known = 1000 if facts["class_cond"] else 0
    return Adapter(net, (3, side, side), path, "eps", time=lambda t: n * t - 1, call=call, classes=known)
