"""The commands of `k2`, one file per topic; modules that compute are imported inside the commands."""
