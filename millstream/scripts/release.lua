-- release: hand a job back without counting an attempt (shutdown, a long wait).
--
-- KEYS  1 state  2 open
-- ARGV  1 job id  2 holder (TOKEN:ATTEMPT)  3 ms until it may run again (0: now)  4 ms until a sweep looks after it
--       5 what it waits for (JSON or '')
-- Returns {'released'}  {'closed', status}  {'fenced'}  {'unknown'}
-- A lost reply may be retried: a job that is queued without a holder is released already.
-- Whoever releases a job delivers it again; if that is lost, the sweep does.
-- flags: allow-oom
-- uses: _ending

local s = redis.call('HMGET', KEYS[1], 'status', 'holder')
if not s[1] then
  return {'unknown'}
end
if CLOSED[s[1]] then
  return {'closed', s[1]}
end
if s[1] == 'queued' and s[2] == '' then
  return {'released'}
end
if s[1] ~= 'in_progress' or s[2] ~= ARGV[2] then
  return {'fenced'}
end
local now = server_ms()
redis.call('HSET', KEYS[1], 'status', 'queued', 'holder', '', 'reason', 'released')
redis.call('HDEL', KEYS[1], 'lease')
if tonumber(ARGV[3]) > 0 then
  redis.call('HSET', KEYS[1], 'not_before', now + ARGV[3], 'wait', ARGV[5])
end
redis.call('ZADD', KEYS[2], now + ARGV[4], ARGV[1])
return {'released'}
