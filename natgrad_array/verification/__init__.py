"""The claims of the theory, and any preconditioner, put to the test."""

from natgrad_array.verification.preconditioner import PreconditionerCheck, check_preconditioner
from natgrad_array.verification.report import Report, Row
from natgrad_array.verification.verify import verify

__all__ = ["PreconditionerCheck", "Report", "Row", "check_preconditioner", "verify"]
