"""Serving policies to robots: openpi's protocol, many clients at once, safe by default.

    dipole serve runs/peg                        # from the shell
    from dipole.serving.client import PolicyClient

Needs the extra `serve` (websockets, msgpack).
"""
