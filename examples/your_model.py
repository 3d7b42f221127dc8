"""ERG on a transformer of your own: all that you write beside erg.py. Run: python examples/your_model.py"""
import sys
from pathlib import Path
import torch
from torch.nn import Embedding, Linear, Module, Sequential, functional as F
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # erg.py, one folder up
import erg

class Block(Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = Linear(32, 96), Linear(32, 32)
    def forward(self, x):  # the one demand: attention is F.scaled_dot_product_attention on (B, H, S, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

class YourTransformer(Module):
    def __init__(self):
        super().__init__()
        self.classes, self.blocks = Embedding(11, 32), Sequential(*[Block() for _ in range(6)])
    def forward(self, x, t, label):  # x (B, 16, 32), t (B,): 0 is noise, 1 is data; label (B,): 10 is none
        return self.blocks(x + t[:, None, None] + self.classes(label)[:, None])

def sample_flow(model, x, label, guidance, steps=20):  # the model predicts v = data - noise; Euler
    for i in range(steps):
        x = x + guidance(model, x, i / steps, label) / steps
    return x

def sample_ddim(model, x, label, guidance, signal=torch.linspace(0.01, 1, 21).tolist()):  # predicts noise
    for i, (now, then) in enumerate(zip(signal, signal[1:])):  # x = now**0.5 * data + (1 - now)**0.5 * noise
        noise = guidance(model, x, i / (len(signal) - 1), label)  # eq. 10 on noise: the same guidance
        x = then**0.5 * (x - (1 - now)**0.5 * noise) / now**0.5 + (1 - then)**0.5 * noise
    return x

if __name__ == "__main__":
    model, x, label = YourTransformer().eval().requires_grad_(False), torch.randn(4, 16, 32), torch.arange(4)
    print(calls := erg.attention_calls(model, x, torch.zeros(4), label))  # which layers there are
    settings = erg.ERG(w=3.0, tau_i=0.01, layers=calls.middle_third())  # the negative: no label, and I-ERG
    for name, sample in ("flow", sample_flow), ("noise, DDIM", sample_ddim):  # a new Guidance for each run
        print(f"{name}:", sample(model, x, label, erg.Guidance(settings, torch.tensor([10]))).shape)
