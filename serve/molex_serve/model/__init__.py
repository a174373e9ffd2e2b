"""What a served model computes for a batch in which every token may belong to another adapter."""
