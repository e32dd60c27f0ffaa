"""What is wrong with this machine, or keeps a bundle from running on it: facts in, findings with their cures out.

``gather`` looks at the machine once, ``examine`` runs the checks over what it found, and ``visit`` does both, and asks
whether a bundle will run. ``data/compatibility.json`` is the table of what goes with what.
"""

from onecard.doctor.examine import CHECKS, Visit, examine, visit
from onecard.doctor.facts import Facts
from onecard.doctor.finding import Finding, Level, exit_code
from onecard.doctor.gather import gather

__all__ = ["CHECKS", "Facts", "Finding", "Level", "Visit", "examine", "exit_code", "gather", "visit"]
