"""A synthetic world of captioned shapes whose pictures can be judged exactly."""
