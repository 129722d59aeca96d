"""Write a net with its solves to an ONNX file, and run that in onnxruntime, for batches of any size.

python examples/onnx_file.py [FILE.onnx]        (pip install '.[onnx]')
"""

import logging
import sys
import warnings

import onnxruntime
import timm
import torch

from pcdeq_zoo import DATASETS
from pcdeq_zoo.data import load, normalize

file = sys.argv[1] if len(sys.argv) > 1 else "pcdeq1_mc_relu6_mnist.onnx"
model = timm.create_model("pcdeq1_mc_relu6_mnist", pretrained=True, tol=1e-4).eval()
images, labels = load(DATASETS["mnist"], "test", "sample")
x = normalize(images, DATASETS["mnist"])

with warnings.catch_warnings(), torch.no_grad():
    warnings.simplefilter("ignore")  # of the exporter's own
    logging.disable()
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    torch.onnx.export(model, (x[:2],), dynamo=True, dynamic_shapes=shapes, verbose=False).save(file)

options = onnxruntime.SessionOptions()
options.log_severity_level = 3
session = onnxruntime.InferenceSession(file, options)
(logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
with torch.no_grad():
    error = (torch.from_numpy(logits) - model(x)).abs().max().item()
right = (torch.from_numpy(logits).argmax(1) == labels).sum().item()
print(f"{file} in onnxruntime: {right} of {len(labels)} right, logits within {error:.1e} of PyTorch's")
