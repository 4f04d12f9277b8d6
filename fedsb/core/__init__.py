"""Ground: named tensors, random streams, errors, files, logs; no other room is imported here."""
