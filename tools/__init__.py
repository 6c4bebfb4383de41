"""Programs around a run; nothing imports them."""
