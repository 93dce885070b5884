"""Artifacts in object stores: commits by conditional creation, without locks, renames or appends."""
