"""Two sequences [2, 24] of packed documents: of 1, 9 and 14 tokens, and of 24 (longer than Mistral's window of 8)."""

import torch

SIZES = [[1, 9, 14], [24]]
IDS = (torch.arange(48) * 11 % 117).view(2, 24)
STARTS = torch.tensor([[1, 1, *[0] * 8, 1, *[0] * 13], [1, *[0] * 23]], dtype=torch.uint8)
