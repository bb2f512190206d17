"""DiLoCo around a plain torch loop. Start it with: torchrun --nproc_per_node 2 docs/examples/own_loop.py"""

import torch
from torch import nn

import lowcomm
from lowcomm import DiLoCo, SoloComm
from lowcomm.comm.distributed import under_torchrun

comm = lowcomm.connect("gloo") if under_torchrun() else SoloComm()
torch.manual_seed(comm.rank)  # each replica sees data of its own; attach makes their parameters equal
target = torch.linspace(-1, 1, 8)
model = nn.Linear(8, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

sync = lowcomm.attach(model, optimizer, DiLoCo(every=20), comm)
for _ in range(400):
    x = torch.randn(32, 8)
    loss = nn.functional.mse_loss(model(x).squeeze(1), x @ target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    sync.step()
sync.finish()

error = (model.weight.detach() - target).norm().item()
print(f"replica {comm.rank}: distance to the target {error:.4f}")
lowcomm.disconnect()
