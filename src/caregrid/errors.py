"""Every error caregrid raises, on one page. The docstring of a class is its message.

    CaregridError                      exit code 1
    ├── ConfigError                    2   the site's own settings
    │   ├── UnknownSetting
    │   ├── BadSetting
    │   └── SiteMissing
    ├── IntakeError                    3   what came in by a door
    │   ├── MalformedObject
    │   ├── SopMismatch
    │   ├── StoreFull
    │   ├── BodyBroken
    │   ├── QueryInvalid
    │   └── NoFrames
    ├── WorkflowError                  4   a workflow file, or one applied to a study
    │   ├── WorkflowInvalid
    │   ├── WorkflowUnknown
    │   └── ConditionError
    ├── RegistryError                  5   model packages
    │   ├── ManifestInvalid
    │   ├── ModelUnknown
    │   ├── NotSigned
    │   ├── SignatureRefused
    │   ├── PackageAltered
    │   ├── SignatureExpired
    │   ├── KeyUnknown
    │   ├── KeyRevoked
    │   ├── PackageRefused
    │   ├── ModelExists
    │   └── ModelStateRefused
    ├── RuntimeFailure                 6   running an algorithm
    │   ├── SandboxMissing
    │   ├── AlgorithmFailed
    │   ├── AlgorithmTimedOut
    │   ├── AlgorithmOutOfMemory
    │   ├── AlgorithmCancelled
    │   ├── AlgorithmBroken
    │   └── InputRefused
    │       ├── VolumeRefused
    │       ├── PixelsUndecodable
    │       └── NoSuitableInput
    ├── ResultError                    7   writing and delivering results
    │   ├── ResultInvalid
    │   └── DeliveryFailed
    │       └── DeliveryRefused
    ├── StateError                     8   a change the state tables do not allow
    │   ├── TransitionRefused
    │   ├── NotFound
    │   ├── AlreadyDecided
    │   └── ReviewOutdated
    ├── AccessError                    9   who may do what
    │   ├── LoginRefused
    │   ├── NotAllowed
    │   ├── UserInvalid
    │   ├── SignInNeeded
    │   └── FormRefused
    └── AuditBroken                    10  the hash chain does not hold

Details never hold patient data: say which file, tag, UID or setting, never a name, identifier or date of a person.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar


class CaregridError(Exception):
    """Something went wrong in caregrid"""

    exit_code: ClassVar[int] = 1

    def __init__(self, **details: Any) -> None:
        self.details = details
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The class's docstring with the details filled in."""
        text = inspect.cleandoc(type(self).__doc__ or "").replace("\n", " ")
        return text.format_map(_Blanks(self.details))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.details))


class _Blanks(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "?"


def _rebuild(kind: type[CaregridError], details: dict[str, Any]) -> CaregridError:
    return kind(**details)


class ConfigError(CaregridError):
    """The site's settings cannot be used: {reason}"""

    exit_code = 2


class UnknownSetting(ConfigError):
    """{file}: unknown setting {key}{hint}"""


class BadSetting(ConfigError):
    """{file}: setting {key} {reason}"""


class SiteMissing(ConfigError):
    """There is no site at {path}; make one with: caregrid site init {path}"""


class IntakeError(CaregridError):
    """An object could not be taken in: {reason}"""

    exit_code = 3
    dimse_status: ClassVar[int] = 0xC000


class MalformedObject(IntakeError):
    """The object is not readable DICOM and was quarantined: {reason}"""

    dimse_status = 0xC000


class SopMismatch(IntakeError):
    """The data set does not match the SOP Class or Instance announced, and was quarantined: {reason}"""

    dimse_status = 0xA900


class StoreFull(IntakeError):
    """Too little space is left to keep the object safely; send it again later"""

    dimse_status = 0xA700


class BodyBroken(IntakeError):
    """The request's body could not be read to its end: {reason}"""


class QueryInvalid(IntakeError):
    """The search cannot be done: {reason}"""


class NoFrames(IntakeError):
    """The object holds no such frame"""


class WorkflowError(CaregridError):
    """The workflow cannot be used: {reason}"""

    exit_code = 4


class WorkflowInvalid(WorkflowError):
    """{file}:{line}: {reason}"""

    @property
    def problems(self) -> list[tuple[int, str]]:
        """All that is wrong with the file, as (line, reason)."""
        return list(self.details.get("problems", ()))


class WorkflowUnknown(WorkflowError):
    """No workflow is called {name}"""


class ConditionError(WorkflowError):
    """Condition {condition} cannot be judged: {reason}"""


class RegistryError(CaregridError):
    """The model package cannot be used: {reason}"""

    exit_code = 5


class ManifestInvalid(RegistryError):
    """{file}: {reason}"""


class ModelUnknown(RegistryError):
    """No model {name} {version} is in the registry"""


class NotSigned(RegistryError):
    """Model {name} {version} is not signed; sign it with: caregrid model sign {name} {version}"""


class SignatureRefused(RegistryError):
    """The signature of model {name} {version} does not hold: {reason}"""


class PackageAltered(RegistryError):
    """Model {name} {version} was altered after it was signed: {file} {what}"""


class SignatureExpired(RegistryError):
    """The signature of model {name} {version} expired on {expired}"""


class KeyUnknown(RegistryError):
    """Model {name} {version} is signed by key {key_id}, which this site does not trust"""


class KeyRevoked(RegistryError):
    """Model {name} {version} is signed by key {key_id}, which this site has revoked"""


class PackageRefused(RegistryError):
    """The model package cannot be taken in: {file} {reason}"""


class ModelExists(RegistryError):
    """A different package is already in the registry as {name} {version}; a changed package needs another version"""


class ModelStateRefused(RegistryError):
    """Model {name} {version} is {state} and cannot run"""


class RuntimeFailure(CaregridError):
    """The algorithm could not be run: {reason}"""

    exit_code = 6
    retryable: ClassVar[bool] = True


class SandboxMissing(RuntimeFailure):
    """This machine has no {sandbox}; third-party code is never run outside it. See: caregrid doctor"""

    retryable = False


class AlgorithmFailed(RuntimeFailure):
    """Algorithm {name} {version} failed: {reason}"""


class AlgorithmTimedOut(RuntimeFailure):
    """Algorithm {name} {version} did not finish in {seconds} s and was stopped"""


class AlgorithmOutOfMemory(RuntimeFailure):
    """Algorithm {name} {version} needed more than its {memory_mb} MB and was stopped"""


class AlgorithmCancelled(RuntimeFailure):
    """Algorithm {name} {version} was stopped because its run was cancelled"""

    retryable = False


class AlgorithmBroken(RuntimeFailure):
    """Algorithm {name} {version} gave an answer that does not fit its manifest: {reason}"""

    retryable = False


class InputRefused(RuntimeFailure):
    """The study cannot be given to the algorithm: {reason}"""

    retryable = False


class VolumeRefused(InputRefused):
    """The series is not a sound volume ({code}): {reason}"""


class PixelsUndecodable(InputRefused):
    """The pixels in transfer syntax {transfer_syntax} cannot be decoded: {reason}"""


class NoSuitableInput(InputRefused):
    """No series of the study fits input {input}: {reason}"""


class ResultError(CaregridError):
    """The result cannot be used: {reason}"""

    exit_code = 7


class ResultInvalid(ResultError):
    """The {kind} object is not valid DICOM and was held back: {reason}"""


class DeliveryFailed(ResultError):
    """Destination {destination} could not be reached or is out of resources: {reason}"""


class DeliveryRefused(DeliveryFailed):
    """Destination {destination} refused the object: {reason}"""


class StateError(CaregridError):
    """That change is not possible: {reason}"""

    exit_code = 8


class TransitionRefused(StateError):
    """A {thing} that is {old} cannot become {new}"""


class NotFound(StateError):
    """There is no {thing} {key}"""


class AlreadyDecided(StateError):
    """Review {key} was already decided: {decision} by {who}"""


class ReviewOutdated(StateError):
    """The result changed after the page was opened; nothing was recorded. Look at the new result and decide again"""


class AccessError(CaregridError):
    """That is not allowed"""

    exit_code = 9


class LoginRefused(AccessError):
    """The user name or password is wrong, or the account is locked"""


class NotAllowed(AccessError):
    """Role {roles} may not {action}"""


class UserInvalid(AccessError):
    """The user cannot be kept: {reason}"""


class SignInNeeded(AccessError):
    """Sign in to see this page"""


class FormRefused(AccessError):
    """The form was not sent from one of our pages, or the page was left open too long; go back, reload and try again"""


class AuditBroken(CaregridError):
    """The audit log does not hold at record {seq}: {reason}"""

    exit_code = 10
