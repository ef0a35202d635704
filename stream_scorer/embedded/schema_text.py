"""Features of a public log as a schema's TOML."""

from __future__ import annotations


def sparse(name: str, source: str, size: int, dimension: int = 8, *, hashed: bool = True) -> str:
    """A sparse feature in a schema's TOML."""
    flag = "true" if hashed else "false"
    return (
        f'[[features]]\nname = "{name}"\nkind = "sparse"\nsource = "{source}"\n'
        f"vocabulary_size = {size}\nembedding_dim = {dimension}\nuse_hash = {flag}\n\n"
    )


def dense(name: str, source: str, dimension: int) -> str:
    """A dense feature in a schema's TOML."""
    return f'[[features]]\nname = "{name}"\nkind = "dense"\nsource = "{source}"\ndimension = {dimension}\n\n'
