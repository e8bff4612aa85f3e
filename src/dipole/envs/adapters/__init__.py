"""Adapters: one file per simulator, which is imported when its first environment is built."""
