"""Attacks that put a claimed epsilon to the test."""

from groundwire.callbacks.privacy.audit.canaries import Canaries, RecordFormat, draw_canaries
from groundwire.callbacks.privacy.audit.mechanism import audit_mechanism
from groundwire.callbacks.privacy.audit.membership import (
    ShadowStatistics,
    membership_audit,
    record_statistics,
    shadow_statistics,
)
from groundwire.callbacks.privacy.audit.one_run import PrivacyAudit
from groundwire.callbacks.privacy.audit.plots import plot_roc
from groundwire.callbacks.privacy.audit.result import AttackResult, AuditReport

__all__ = [
    "AttackResult",
    "AuditReport",
    "Canaries",
    "PrivacyAudit",
    "RecordFormat",
    "ShadowStatistics",
    "audit_mechanism",
    "draw_canaries",
    "membership_audit",
    "plot_roc",
    "record_statistics",
    "shadow_statistics",
]
