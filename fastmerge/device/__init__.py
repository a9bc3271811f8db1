"""The engine on a GPU: chunks through pinned buffers, copied in, merged and copied back on three streams.

protocol.py   what a device is: memory, streams, events, copies
cuda.py       the real ones, through torch.cuda
budget.py     chunk size and number of buffers within --max-vram
stage.py      buffers in flight on one device
stream.py     a parameter's chunks through a stage (a methods.TensorStream)
fleet.py      stages of several devices, tensors shared out among them
choose.py     --device: what the name means, and whether `auto` takes the GPU
"""

from .budget import Budget, make_budget
from .choose import Choice, choose, use_devices
from .fleet import Fleet
from .protocol import Device
from .stage import Stage
from .stream import DeviceStream

__all__ = ["Budget", "Choice", "Device", "DeviceStream", "Fleet", "Stage", "choose", "make_budget", "use_devices"]
