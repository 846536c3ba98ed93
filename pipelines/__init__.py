"""The DAGs. Importing one builds it; nothing here computes."""
