"""Several processes that train one model: who is who, what they tell each other, which rows each takes, what of the
weights each holds, and how they are started. In one process everything here does what that process would do alone."""
