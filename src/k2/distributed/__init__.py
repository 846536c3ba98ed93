"""Training over many ranks: expert parallelism and ZeRO-1 data parallelism on torch.distributed."""
