"""The model: layout of tensors, attention, mixture of experts, transformer, generation, interchange."""
