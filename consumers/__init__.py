"""What is done: handlers of events, the tender of a session, the sweep, and the worker that runs them."""
