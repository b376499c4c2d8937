"""Not built yet: the tuner belongs here. Every kernel runs on the analytic knobs of its schedule family."""
