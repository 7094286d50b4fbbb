"""The tools that people use today, set up as their documentation says, as competitors."""
