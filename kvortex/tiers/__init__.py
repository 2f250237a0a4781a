"""Where blocks go that RAM cannot hold: what every tier promises, the record of a block, and tiers by their medium."""
