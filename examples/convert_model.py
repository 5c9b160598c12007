"""Makes an existing model faster, checks that it still computes the same, and undoes it.

python examples/convert_model.py
"""

import copy

import torch

import fastnn
from fastnn.testing import verify_model

torch.manual_seed(0)
original = torch.nn.TransformerEncoderLayer(d_model=256, nhead=4, dim_feedforward=1024, dropout=0.0, batch_first=True)

# The one line. It works in place and returns the model; the copy is for the comparison below.
model = fastnn.convert(copy.deepcopy(original))

print(fastnn.report(model))

# Outputs and the gradient of every parameter, against float64, beside torch's own error.
inputs = torch.randn(8, 32, 256, requires_grad=True)
result = verify_model(original, model, inputs)
print(result.verdict)
assert result

# For inference, keep the weights packed.
fastnn.prepack_(model.eval())
with torch.inference_mode():
    model(inputs)

# And back: every class is torch's own again.
fastnn.revert(model)
assert all(not type(module).__module__.startswith("fastnn") for module in model.modules())
