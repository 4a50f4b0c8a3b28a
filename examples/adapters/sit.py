"""SiT-XL/2 of willisma/SiT, from your clone, its checkpoint, and a folder with the autoencoder: a flow on latents.

--model 'examples/adapters/sit.py:load(clone=PATH,checkpoint=FILE.pt,vae=FOLDER)'
Written from the repository's interface; not run here, where no clone was at hand: `evalbench check` tells.
"""

import torch

from evalbench.models.adapter import Adapter, use_clone


def load(clone, checkpoint, vae, side=32):
    """The adapter."""
    use_clone(clone)
    from diffusers import AutoencoderKL
    from models import SiT_models

    net = SiT_models["SiT-XL/2"](input_size=side, num_classes=1000)
    net.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    net.vae = AutoencoderKL.from_pretrained(vae)  # a part of the network, so that it moves along
    scale = net.vae.config.scaling_factor
    decode = lambda x: net.vae.decode(x / scale).sample  # noqa: E731
    encode = lambda y: net.vae.encode(y).latent_dist.mean * scale  # noqa: E731
    call = lambda net, x, t, k: -net(x, t, k)  # noqa: E731 - its time is 1 at the data, its velocity points there
    facts = {"time": lambda t: 1 - t, "decode": decode, "encode": encode, "classes": 1000, "null": 1000}
    return Adapter(net, (4, side, side), "flow", "velocity", call=call, **facts)
