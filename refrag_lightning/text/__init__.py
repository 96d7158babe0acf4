"""Strings to tensors: documents, packing, alignment, batches. No `nn.Module` lives here."""
