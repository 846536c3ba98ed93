"""MuonClip: Muon per logical matrix, AdamW for the rest, QK-Clip, and the learning-rate schedule."""
