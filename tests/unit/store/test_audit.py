"""The audit chain shows every change made behind its back."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from caregrid.errors import AuditBroken
from caregrid.store import audit
from caregrid.store.database import reading, writing


@pytest.fixture
def chain(db: sa.Engine) -> sa.Engine:
    with writing(db) as connection:
        for number in range(5):
            audit.append(
                connection, who="ann", what="did", subject=f"thing:{number}", why="because", detail={"n": number, "é": "ü"}
            )
    return db


def verified(engine: sa.Engine, head: tuple[int, str] | None = None) -> tuple[int, str]:
    with reading(engine) as connection:
        return audit.verify(connection, head)


def test_whole_chain_holds(chain: sa.Engine) -> None:
    count, head = verified(chain)
    assert count == 5
    assert verified(chain, (5, head)) == (5, head)


@pytest.mark.parametrize(
    ("change", "seq", "words"),
    [
        ("update audit set who = 'eve' where seq = 3", 3, "content was changed"),
        ("delete from audit where seq = 3", 3, "missing"),
        ("update audit set hash = 'x' where seq = 2", 2, "content was changed"),
        ("update audit set detail = '{}' where seq = 4", 4, "content was changed"),
        ("update audit set at = '2000-01-01' where seq = 1", 1, "content was changed"),
    ],
)
def test_tampering_is_found_where_it_was_done(chain: sa.Engine, change: str, seq: int, words: str) -> None:
    with writing(chain) as connection:
        connection.execute(sa.text(change))
    with pytest.raises(AuditBroken, match=f"record {seq}: .*{words}"):
        verified(chain)


def test_rewritten_record_with_a_fitting_hash_breaks_the_next(chain: sa.Engine) -> None:
    with writing(chain) as connection:
        row = dict(connection.execute(sa.text("select * from audit where seq = 2")).mappings().one())
        row["detail"] = {"n": 1, "é": "ü"}
        row["who"] = "eve"
        connection.execute(sa.text("update audit set who = 'eve', hash = :hash where seq = 2"), {"hash": audit.record_hash(row)})
    with pytest.raises(AuditBroken, match="record 3"):
        verified(chain)


def test_truncation_is_found_with_a_head_kept_elsewhere(chain: sa.Engine) -> None:
    _, head = verified(chain)
    with writing(chain) as connection:
        connection.execute(sa.text("delete from audit where seq = 5"))
    assert verified(chain)[0] == 4
    with pytest.raises(AuditBroken, match="once written"):
        verified(chain, (5, head))


def test_record_goes_with_the_change_or_not_at_all(db: sa.Engine) -> None:
    with pytest.raises(RuntimeError), writing(db) as connection:
        audit.append(connection, who="ann", what="did", subject="thing:1", why="because")
        raise RuntimeError
    assert verified(db) == (0, audit.GENESIS)
