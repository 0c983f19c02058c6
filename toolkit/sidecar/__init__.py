"""The sidecar: gate decisions, meta-learner versions, and the tick that keeps a run going."""
