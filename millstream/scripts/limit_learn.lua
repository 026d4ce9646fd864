-- limit_learn: what an upstream said about its limits, for all workers at once.
--
-- KEYS  1 to 11 as _meter says
-- ARGV  1 the meter's name  2 window (ms)  3 ms it wants to be left alone (0: not said)  4 1: it refused without saying
--       for how long (else 0)  5 its limit of requests  6 what remains of it  7 ms until that is whole again  8 to 10 the
--       same of tokens ('': not said)
-- Returns {ms it is left alone, requests, tokens a window as they are now (0: no limit)}
-- Nothing here raises a limit: a lower one holds for ten windows, a lower rest is counted as used now, a refusal without
-- a time slows down to 7 tenths of what was asked in the last window, and from there 5 % faster every sixth of a window.
-- A lost reply may be retried: refusals within a thirtieth of a window are one.
-- flags: allow-oom
-- uses: _meter

local name, window, alone = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
open_meter(window)
read_seldom()
local until_when = 0
if alone > 0 then
  m.cooling = max(m.cooling, now + alone)
  call('HSET', METER, 'cooling', int(m.cooling))
  until_when = m.cooling
end
if ARGV[4] == '1' and now - m.paced > window / 30 then
  local rpm = limits()
  local rate = max(m.r, 1)
  if rpm > 0 then
    rate = min(rate, rpm)
  end
  local least = max(1, window / 2000) -- half a request a second
  m.base, m.pace, m.paced = max(rate, least), max(rate * 0.7, least), now
  call('HSET', METER, 'base', string.format('%.3f', m.base), 'pace', string.format('%.3f', m.pace), 'paced', int(now))
end
if m.pace > 0 then
  until_when = max(until_when, m.paced + 7 * window)
end

local function said(field, limit, rest, reset, configured)
  limit, rest, reset = tonumber(limit), tonumber(rest), tonumber(reset)
  if not limit or limit <= 0 or (reset and reset > window * 1.1) then
    return false -- nothing was said, or of another time than a window
  end
  local lower = configured == 0 or limit < configured
  if lower then
    m[field == 'r' and 'rpm_seen' or 'tpm_seen'] = limit
  end
  local ours = lower and limit or configured
  if rest and rest >= 0 and rest < ours - m[field] then
    local more = ours - m[field] - rest
    count(slot, 0, field == 'r' and more or 0, field == 't' and more or 0)
  end
  return lower
end
local r_lower = said('r', ARGV[5], ARGV[6], ARGV[7], m.rpm)
local t_lower = said('t', ARGV[8], ARGV[9], ARGV[10], m.tpm)
if r_lower or t_lower then
  m.seen = now + 10 * window
  until_when = max(until_when, m.seen)
  call('HSET', METER, 'rpm_seen', int(m.rpm_seen), 'tpm_seen', int(m.tpm_seen), 'seen', int(m.seen))
end
save_meter()
call('ZADD', MEASURES, now + KEPT, name)
call('PEXPIRE', MEASURES, KEPT)
call('ZREMRANGEBYSCORE', LEARNED, '-inf', now)
if until_when > now then
  call('ZADD', LEARNED, 'GT', int(until_when), name)
  call('PEXPIRE', LEARNED, KEPT)
end
local rpm, tpm = limits()
return {max(0, m.cooling - now), floor(rpm), floor(tpm)}
