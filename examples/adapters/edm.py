"""A network of NVlabs/edm, from your clone and checkpoint: x0 on the EDM path.

--model 'examples/adapters/edm.py:load(clone=PATH,checkpoint=FILE.pkl)' --trust-remote-code
Written from the repository's interface; not run here, where no clone was at hand: `evalbench check` tells.
"""

import pickle

import torch

from evalbench.models.adapter import Adapter, require_trust, use_clone


def load(clone, checkpoint):
    """The adapter."""
    use_clone(clone)
    require_trust(checkpoint)
    with open(checkpoint, "rb") as file:
        net = pickle.load(file)["ema"]
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    rows = torch.eye(net.label_dim) if net.label_dim else None
    call = lambda net, x, sigma, k: net(x, sigma, None if k is None else rows.to(x)[k])  # noqa: E731
    return Adapter(net, shape, "edm", "x0", call=call, classes=net.label_dim)
