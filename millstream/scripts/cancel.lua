-- cancel: end a job that is open, in whatever state. The first terminal event wins.
--
-- KEYS  1 state  2 log  3 spec  4 open  5 ended  6 repack
-- ARGV  1 job id
-- Returns {'cancelled'}  or {'closed', status} when it had ended, or {'unknown'}
-- The worker that runs it, if any, learns it as `closed` from its next append or heartbeat.
-- flags: allow-oom
-- uses: _ending

local s = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'seq', 'usage')
if not s[1] then
  return {'unknown'}
end
if CLOSED[s[1]] then
  return {'closed', s[1]}
end
local body = '{"type":"cancelled","finish_reasons":{}'
if s[4] then
  body = body .. ',"usage":' .. s[4]
end
end_job({ARGV[1], KEYS[1], KEYS[2], KEYS[3]}, KEYS[4], KEYS[5], KEYS[6], server_ms(), s[3] + 1, s[2], 'cancelled', body .. '}', '')
return {'cancelled'}
