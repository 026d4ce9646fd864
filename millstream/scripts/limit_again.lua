-- limit_again: leave for a further request of a job that runs already: a retry, a continuation, a restart.
--
-- KEYS  1 to 11 as _meter says
-- ARGV  1 to 7 as limit_acquire  8 ticket  9 lane (0 interactive, 1 batch)  10 tokens of the prompt  11 most tokens of the
--       answer ('': unknown)  12 ms the job may wait where it is  13 a ticket it holds instead and will not use ('': none)
-- Returns {'granted', tokens}  {'too_large', tokens, limit}  {'wait', ms, why}: nothing was used; ask again then
-- Such a request goes before the line. When its wait is short enough, the line stands still for it until 2 s after its
-- time: by then whoever waits has asked again, with the same ticket, or is dead. Who gives up settles it as never asked.
-- A row's place is before the rows alone (a negative score), since chats may have what is kept free for them.
-- After a cool-down alone there is enough for all.
-- A ticket that grew too old to be used is exchanged here, in one step: what it counts comes back before the new one is
-- weighed, which so is not held back by its own shadow, and nobody comes between.
-- A lost reply may be retried: a ticket that is held is granted, one that was given back is given back once.
-- flags: allow-oom
-- uses: _meter

local name, lease, ticket, lane = ARGV[1], tonumber(ARGV[7]), ARGV[8], tonumber(ARGV[9])
local held = call('HGET', HELD, ticket)
if held then
  return {'granted', tonumber(string.match(held, '%d+$'))}
end
open_meter(tonumber(ARGV[6]))
set_limits(name, tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]))
local of, at_slot, reserved = release(ARGV[13])
if of then
  count(at_slot, of, -1, -reserved)
end
local tokens = cost_of(ARGV[10], ARGV[11])
if m.tpm > 0 and tokens > m.tpm then
  save_meter()
  return {'too_large', tokens, m.tpm}
end
local rpm, tpm = limits()
local why, at = blocked(lane, tokens, rpm, tpm)
if why then
  local wait = max(1, at - now)
  local scarce = rpm > 0 or tpm > 0 or m.streams > 0
  if scarce and wait <= tonumber(ARGV[12]) then
    call('ZADD', FRONT, lane == 0 and at + 2000 or -at - 2000, ticket)
    if call('PTTL', FRONT) < wait + 2000 then
      call('PEXPIRE', FRONT, wait + 2000)
    end
  end
  save_meter()
  return {'wait', wait, why}
end
call('ZREM', FRONT, ticket)
call('ZREMRANGEBYSCORE', FRONT, -now, now)
grant(ticket, lane, tokens, lease)
save_meter(lease)
return {'granted', tokens}
