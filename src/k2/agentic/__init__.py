"""Agentic data: tools, agents, tasks with rubrics, simulated and real environments, and the judge."""
