"""IRKD in a plain training loop with timm: what it adds are the lines marked with a comment.

python examples/timm_loop.py [--steps 20]     random images; put your loader and your teacher's weights in
"""

import argparse

import timm
import torch
from torch.nn import functional as F

import irkd_dist  # added

arguments = argparse.ArgumentParser()
arguments.add_argument("--steps", type=int, default=20)
steps = arguments.parse_args().steps

student = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=3, num_classes=10)
teacher = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=4, num_classes=10)
align = irkd_dist.SaliencyLoss(student, teacher, taps=["first", "second", "last"])  # added
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4)
student.train()
for step in range(steps):
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))
    logits, said, saliency = align(images, labels)  # instead of student(images)
    kd = irkd_dist.distillation_loss(logits, said, temperature=4.0)  # added
    loss = F.cross_entropy(logits, labels) + 1.0 * kd + 0.8 * saliency  # the paper's equation 1
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}, kd {kd.item():.3f}, saliency {saliency.item():.4f}")
