"""Entry points of `torch.hub`: every model of the zoo, with its own docstring.

model = torch.hub.load("OWNER/pcdeq-zoo", "pcdeq1_l_tanh_mnist", pretrained=True)
"""

import pcdeq_zoo.pcdeq as _pcdeq
from pcdeq_zoo import VARIANTS as _VARIANTS

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors"]

globals().update({name: getattr(_pcdeq, name) for name in _VARIANTS})
