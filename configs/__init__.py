"""Presets as data: one TOML file each. Installed as the package `specattn_configs`; read by `specattn_jax`."""
